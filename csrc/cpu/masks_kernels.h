// Kernels of masks.cpp, one instruction set. See each_isa.h.

// Philox 4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers, as easy as 1, 2, 3; SC 2011), the words of the first
// `items / 4` lanes of a stream, sixteen lanes at a time. `words` has room for whole groups of 64.
VMAE2_INLINE void philox_words(const Stream& stream, uint32_t purpose, int64_t items, uint32_t* words) {
  for (int64_t lane = 0; 4 * lane < items; lane += 16) {
    uint32_t numbers[16], results[4][16];
    for (int i = 0; i < 16; ++i) numbers[i] = static_cast<uint32_t>(lane + i);
    Words c0 = splat_word(static_cast<uint32_t>(stream.position));
    Words c1 = splat_word(static_cast<uint32_t>(stream.position >> 32));
    Words c2 = splat_word(static_cast<uint32_t>(stream.view)), c3 = load_words(numbers);
    uint32_t k0 = static_cast<uint32_t>(stream.seed), k1 = purpose ^ static_cast<uint32_t>(stream.seed >> 32);
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
      Words high0, low0, high1, low1;
      multiply(c0, 0xD2511F53u, high0, low0);
      multiply(c2, 0xCD9E8D57u, high1, low1);
      c0 = high1 ^ c1 ^ splat_word(k0);
      c1 = low1;
      c2 = high0 ^ c3 ^ splat_word(k1);
      c3 = low0;
    }
    store_words(results[0], c0);
    store_words(results[1], c1);
    store_words(results[2], c2);
    store_words(results[3], c3);
    uint32_t* out = words + 4 * lane;
    for (int i = 0; i < 16; ++i) {
      for (int word = 0; word < 4; ++word) out[4 * i + word] = results[word][i];
    }
  }
}

// keep[i] = 1 for the `count` items with the smallest (word, i), 0 for the others: counted by the top eight bits, so that
// only the few items that share the last chosen item's bits have to be ordered.
inline void keep_smallest(const uint32_t* words, int64_t items, int64_t count, std::vector<uint64_t>& ties, uint8_t* keep) {
  uint32_t counts[256] = {};
  for (int64_t i = 0; i < items; ++i) ++counts[words[i] >> 24];
  int64_t below = 0;  // items in the bins before `last`
  uint32_t last = 0;
  while (last < 256 && below + counts[last] <= count) below += counts[last++];
  ties.clear();
  for (int64_t i = 0; i < items; ++i) {
    const uint32_t bin = words[i] >> 24;
    keep[i] = bin < last;
    if (bin == last) ties.push_back(uint64_t{words[i]} << 32 | static_cast<uint64_t>(i));
  }
  if (below == count) return;
  std::nth_element(ties.begin(), ties.begin() + (count - below), ties.end());
  for (int64_t i = 0; i < count - below; ++i) keep[ties[static_cast<size_t>(i)] & 0xffffffffu] = 1;
}

// Indices of the sites that are set, ascending; their number. `out` has room for all sites.
VMAE2_INLINE int64_t list_sites(const uint8_t* set, int64_t sites, int32_t* out) {
  int64_t n = 0;
  for (int64_t i = 0; i < sites; ++i) {
    out[n] = static_cast<int32_t>(i);
    n += set[i];
  }
  return n;
}

// The part of `decode`'s list that the encoder does not see, and the place of each in it.
VMAE2_INLINE void list_loss(const uint8_t* visible, FrameList& list) {
  int64_t n = 0;
  for (int64_t i = 0; i < list.decoded; ++i) {
    const int32_t site = list.decode[i];
    list.loss_site[n] = site;
    list.loss_slot[n] = static_cast<int32_t>(i);
    n += !visible[site];
  }
  list.losses = n;
}

VMAE2_INLINE void shifted_copy(const int32_t* in, int64_t n, int64_t by, int32_t* out) {
  const auto shift = static_cast<int32_t>(by);
  for (int64_t i = 0; i < n; ++i) out[i] = in[i] + shift;
}

// What the frames of a sample decode: lists by `frame_list`, each for the sites of one frame.
inline void draw_lists(const Job& job, const Stream& stream, Work& work) {
  const MaskPlan& plan = job.plan;
  uint32_t* words = work.words.data();
  philox_words(stream, kEncoder, job.sites, words);
  keep_smallest(words, job.sites, plan.visible_sites, work.ties, work.visible.data());
  uint8_t* kept = work.kept.data();
  switch (job.kind) {
    case Kind::running_cell: {
      philox_words(stream, kDecoder, 1, words);
      work.phase = words[0] & 3u;
      for (FrameList& list : work.lists) list_loss(work.visible.data(), list);  // `decode` is the same in every sample
      return;
    }
    case Kind::none:
      for (int64_t i = 0; i < job.sites; ++i) kept[i] = !work.visible[static_cast<size_t>(i)];
      break;
    case Kind::frame:
      philox_words(stream, kDecoder, plan.frames, words);
      keep_smallest(words, plan.frames, plan.kept, work.ties, kept);
      list_loss(work.visible.data(), work.lists[0]);  // `decode` holds all sites
      return;
    case Kind::random:
      philox_words(stream, kDecoder, plan.frames * job.sites, words);
      keep_smallest(words, plan.frames * job.sites, plan.kept, work.ties, kept);
      break;
    case Kind::tube:
      philox_words(stream, kDecoder, job.sites, words);
      keep_smallest(words, job.sites, plan.kept, work.ties, kept);
      break;
  }
  for (size_t k = 0; k < work.lists.size(); ++k) {
    FrameList& list = work.lists[k];
    list.decoded = list_sites(kept + static_cast<int64_t>(k) * job.sites, job.sites, list.decode.data());
    list_loss(work.visible.data(), list);
  }
}

// The list of frame t, or nullptr where nothing of it is decoded.
VMAE2_INLINE const FrameList* frame_list(const Job& job, const Work& work, int64_t t) {
  switch (job.kind) {
    case Kind::running_cell: return &work.lists[static_cast<size_t>((work.phase + t) % 4)];
    case Kind::random: return &work.lists[static_cast<size_t>(t)];
    case Kind::frame: return work.kept[static_cast<size_t>(t)] ? &work.lists[0] : nullptr;
    default: return &work.lists[0];
  }
}

inline void draw_samples(const Job& job, Work& work, int64_t begin, int64_t end) {
  const MaskPlan& plan = job.plan;
  for (int64_t b = begin; b < end; ++b) {
    draw_lists(job, {plan.seed, static_cast<uint64_t>(job.position[b]), static_cast<uint64_t>(job.view[b])}, work);
    int32_t* seen = job.visible_index + b * plan.frames * plan.visible_sites;
    int32_t* decode = job.decode_index + b * plan.decoded;
    int32_t* loss = job.loss_index + b * plan.loss;
    int32_t* slot = job.loss_slot + b * plan.loss;
    int32_t* visible = work.visible_sites.data();
    list_sites(work.visible.data(), job.sites, visible);
    int64_t decoded = 0, losses = 0;
    for (int64_t t = 0; t < plan.frames; ++t) {
      shifted_copy(visible, plan.visible_sites, t * job.sites, seen + t * plan.visible_sites);
      const FrameList* list = frame_list(job, work, t);
      if (list == nullptr) continue;
      // The bounds hold by the plan's arithmetic; they keep a wrong plan from writing past the lists.
      const int64_t more = std::min(list->decoded, plan.decoded - decoded), most = std::min(list->losses, plan.loss - losses);
      shifted_copy(list->decode.data(), more, t * job.sites, decode + decoded);
      shifted_copy(list->loss_site.data(), most, t * job.sites, loss + losses);
      shifted_copy(list->loss_slot.data(), most, decoded, slot + losses);
      decoded += more;
      losses += most;
    }
    std::fill(decode + decoded, decode + plan.decoded, -1);
    std::fill(loss + losses, loss + plan.loss, -1);
    std::fill(slot + losses, slot + plan.loss, 0);
  }
}
