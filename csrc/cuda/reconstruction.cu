// Target, squared error and its gradient for the loss patches on the GPU. See vmae2_fast/ops/reconstruction.py.
//
// Sums are added in a fixed order everywhere, so a loss has the same bits in every run.
#include "token.cuh"

namespace vmae2 {
namespace cuda {
namespace {

constexpr double kEps = 1e-6;  // added to the standard deviation of pixels in [0, 1]

// target = (pixel - centre) * factor
struct Target {
  float centre, factor;
};

// Of a channel's n pixels, whose distances from `origin` have these sums; `unit` is what 1.0 is in them. Sums of bytes are
// exact in double, so a constant patch has variance 0 and its own value as centre.
__device__ Target target_of(double sum, double squares, double n, double origin, double unit) {
  const double variance = fmax(0.0, (squares - sum * sum / n) / (n - 1));
  return {static_cast<float>(origin + sum / n), static_cast<float>(1.0 / (sqrt(variance) + kEps * unit))};
}

// What the loss is divided by: a number, or where that is 0 the tokens that count.
struct Denominator {
  int64_t number;

  __device__ float of(int64_t count) const { return static_cast<float>(number ? number : count > 1 ? count : 1); }
};

// The derivative of the loss in an error.
__device__ float gradient_scale(const float* upstream, const int64_t* count, Denominator denominator, double two_by_row) {
  return static_cast<float>(static_cast<double>(*upstream / denominator.of(*count)) * two_by_row);
}

// What a row has whose target is not computed: padding counts for nothing, an id outside the grid must show.
__device__ float blank(int32_t id) { return id == -1 ? 0.0f : nan(); }

// ---- Tokens of the models: a warp a token, eight elements a lane at a time.

constexpr int kTokensPerBlock = 8;
constexpr int kGroup = 8;  // elements

template <int PATCH, class Pred>
struct Groups {
  using Token = ByteToken<PATCH>;
  static constexpr int total = Token::row / kGroup, rounds = (total + kWarp - 1) / kWarp;
  static_assert(Token::row % kGroup == 0 && Token::line % 2 == 0 && kGroup * kWarp % 3 == 1);

  Vector<Pred> held[rounds][kGroup / Vector<Pred>::size];

  __device__ void read(const Pred* row, int lane) {
#pragma unroll
    for (int i = 0; i < rounds; ++i) {
      if (const int m = lane + i * kWarp; m < total) {
#pragma unroll
        for (int v = 0; v < kGroup / Vector<Pred>::size; ++v) {
          held[i][v] = reinterpret_cast<const Vector<Pred>*>(row + m * kGroup)[v];
        }
      }
    }
  }
  __device__ float at(int i, int j) const { return load(held[i][j / Vector<Pred>::size].values[j % Vector<Pred>::size]); }

  // Channel of element j in a lane's group i, counted from that of the lane's first element: known at compile time.
  __host__ __device__ static constexpr int channel(int i, int j) { return (i + j) % 3; }
  __device__ static int first_channel(int lane) { return lane * kGroup % 3; }

  // Elements m*kGroup to m*kGroup + 7 of the staged token.
  __device__ static void pixels(const Token& token, int m, uint8_t (&out)[kGroup]) {
    int l = m * kGroup / Token::line, i = m * kGroup % Token::line;
    if constexpr (Token::line % kGroup == 0) {
      *reinterpret_cast<uint2*>(out) = *reinterpret_cast<const uint2*>(token.bytes(l) + i);
    } else {
#pragma unroll
      for (int j = 0; j < kGroup; j += 2) {
        *reinterpret_cast<uint16_t*>(out + j) = *reinterpret_cast<const uint16_t*>(token.bytes(l) + i);
        if ((i += 2) == Token::line) i = 0, ++l;
      }
    }
  }
};

struct alignas(16) LossShared {
  double losses[kTokensPerBlock];
  int sums[kTokensPerBlock][2][3];
  float statistics[kTokensPerBlock][2][3];
};

template <int PATCH, class Pred>
__global__ void __launch_bounds__(kTokensPerBlock* kWarp, 3)
    loss_bytes(const Pred* __restrict__ pred, const uint8_t* __restrict__ clip, const int32_t* __restrict__ index, uint32_t total,
               const __grid_constant__ Geometry g, bool normalize, float* __restrict__ statistics, double2* __restrict__ sums) {
  using Token = ByteToken<PATCH>;
  using Group = Groups<PATCH, Pred>;
  auto& shared = *reinterpret_cast<LossShared*>(shared_memory());
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const uint32_t r = blockIdx.x * kTokensPerBlock + warp;
  const int32_t id = r < total ? index[r] : -1;
  const bool valid = id >= 0 && id < g.tokens;
  const Token token{clip + (valid ? corner(g, r, id) : 0), g.layout.frame, g.layout.line,
                    shared_memory() + sizeof(LossShared) + warp * Token::staged};
  const int first = Group::first_channel(lane);
  Group group;
  alignas(8) uint8_t pixels[kGroup];
  if (valid) {
    group.read(pred + static_cast<int64_t>(r) * Token::row, lane);
    token.stage(lane);
  }
  __syncwarp();
  if (normalize) {
    int sum[2][3] = {};
    if (valid) {
#pragma unroll
      for (int i = 0; i < Group::rounds; ++i) {
        if (lane + i * kWarp >= Group::total) break;
        Group::pixels(token, lane + i * kWarp, pixels);
#pragma unroll
        for (int j = 0; j < kGroup; ++j) {
          sum[0][Group::channel(i, j)] += pixels[j];
          sum[1][Group::channel(i, j)] += pixels[j] * pixels[j];
        }
      }
    }
#pragma unroll
    for (int power = 0; power < 2; ++power) {
#pragma unroll
      for (int c = 0; c < 3; ++c) {
        // Channel c is the lane's own number c - first.
        const int own = c == first ? sum[power][0] : c == (first + 1) % 3 ? sum[power][1] : sum[power][2];
        const int all = __reduce_add_sync(kAllLanes, own);
        if (lane == 0) shared.sums[warp][power][c] = all;
      }
    }
  }
  __syncthreads();
  // One warp for the whole block: double precision is slow on some cards.
  if (threadIdx.x < 3 * kTokensPerBlock) {
    const int w = threadIdx.x / 3, c = threadIdx.x % 3;
    const uint32_t row = blockIdx.x * kTokensPerBlock + w;
    if (row < total) {
      const int32_t its = index[row];
      Target target{0.0f, static_cast<float>(1.0 / 255.0)};
      if (its < 0 || its >= g.tokens) {
        target = {blank(its), blank(its)};
      } else if (normalize) {
        target = target_of(shared.sums[w][0][c], shared.sums[w][1][c], Token::row / 3, 0.0, 255.0);
      }
      float* out = statistics + int64_t{row} * 6 + c;
      out[0] = shared.statistics[w][0][c] = target.centre;
      out[3] = shared.statistics[w][1][c] = target.factor;
    }
  }
  __syncthreads();
  double loss = valid ? 0.0 : blank(id);
  if (valid) {
    float centre[3], factor[3];
#pragma unroll
    for (int c = 0; c < 3; ++c) {
      centre[c] = shared.statistics[warp][0][(first + c) % 3];
      factor[c] = shared.statistics[warp][1][(first + c) % 3];
    }
#pragma unroll
    for (int i = 0; i < Group::rounds; ++i) {
      if (lane + i * kWarp >= Group::total) break;
      Group::pixels(token, lane + i * kWarp, pixels);
      float squares = 0;
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        const int c = Group::channel(i, j);
        const float d = group.at(i, j) - (load(pixels[j]) - centre[c]) * factor[c];
        squares += d * d;
      }
      loss += squares;
    }
  }
  loss = warp_sum(loss) / Token::row;
  if (lane == 0) shared.losses[warp] = loss;
  __syncthreads();
  if (threadIdx.x == 0) {
    double2 sum{0, 0};
    for (uint32_t w = 0; w < kTokensPerBlock && blockIdx.x * kTokensPerBlock + w < total; ++w) {
      sum.x += shared.losses[w];
      sum.y += index[blockIdx.x * kTokensPerBlock + w] != -1;
    }
    sums[blockIdx.x] = sum;
  }
}

template <int PATCH, class Pred>
__global__ void __launch_bounds__(kTokensPerBlock* kWarp)
    gradient_bytes(const float* __restrict__ upstream, const Pred* __restrict__ pred, const uint8_t* __restrict__ clip,
                   const int32_t* __restrict__ index, uint32_t total, const __grid_constant__ Geometry g,
                   const float* __restrict__ statistics, const int64_t* __restrict__ count, Denominator denominator,
                   Pred* __restrict__ grad) {
  using Token = ByteToken<PATCH>;
  using Group = Groups<PATCH, Pred>;
  constexpr int size = Vector<Pred>::size;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const uint32_t r = blockIdx.x * kTokensPerBlock + warp;
  if (r >= total) return;  // whole warps only, and no barrier but the warp's follows
  const int32_t id = index[r];
  auto* out = reinterpret_cast<Vector<Pred>*>(grad + static_cast<int64_t>(r) * Token::row);
  if (id < 0 || id >= g.tokens) {
    for (int m = lane; m < Token::row / size; m += kWarp) out[m] = filled<Pred>(blank(id));
    return;
  }
  const Token token{clip + corner(g, r, id), g.layout.frame, g.layout.line, shared_memory() + warp * Token::staged};
  const int first = Group::first_channel(lane);
  const float scale = gradient_scale(upstream, count, denominator, 2.0 / Token::row);
  Group group;
  group.read(pred + static_cast<int64_t>(r) * Token::row, lane);
  token.stage(lane);
  float centre[3], factor[3];
#pragma unroll
  for (int c = 0; c < 3; ++c) {
    centre[c] = statistics[int64_t{r} * 6 + (first + c) % 3];
    factor[c] = statistics[int64_t{r} * 6 + 3 + (first + c) % 3];
  }
  __syncwarp();
  alignas(8) uint8_t pixels[kGroup];
#pragma unroll
  for (int i = 0; i < Group::rounds; ++i) {
    const int m = lane + i * kWarp;
    if (m >= Group::total) break;
    Group::pixels(token, m, pixels);
    float d[kGroup];
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      const int c = Group::channel(i, j);
      d[j] = (group.at(i, j) - (load(pixels[j]) - centre[c]) * factor[c]) * scale;
    }
#pragma unroll
    for (int v = 0; v < kGroup / size; ++v) {
      Vector<Pred> vector;
#pragma unroll
      for (int j = 0; j < size; j += 2) store2(vector.values + j, d[v * size + j], d[v * size + j + 1]);
      out[m * (kGroup / size) + v] = vector;
    }
  }
}

// ---- Any clip: a block a token. A thread keeps to one channel: its elements are a multiple of the channels apart.

constexpr int kThreads = 128;

template <class Pixel>
__device__ float pixel(const Pixel* in, const Geometry& g, const Affine& n, uint32_t k) {
  const Place at = place(g, k, true);
  const Pixel value = in[offset(g.layout, at)];
  if constexpr (std::is_same_v<Pixel, uint8_t>) return load(value);
  return affine(value, n.scale[at.channel], n.shift[at.channel]);
}

struct TokenShared {
  double sums[2][kThreads];
  double scratch[kThreads / kWarp];
  Target targets[kMaxChannels];
};

template <class Pixel, class Pred>
__global__ void __launch_bounds__(kThreads)
    loss_elements(const Pred* __restrict__ pred, const Pixel* __restrict__ clip, const int32_t* __restrict__ index,
                  const __grid_constant__ Geometry g, const __grid_constant__ Affine n, bool normalize,
                  float* __restrict__ statistics, double2* __restrict__ sums) {
  constexpr double unit = std::is_same_v<Pixel, uint8_t> ? 255.0 : 1.0;
  auto& shared = *reinterpret_cast<TokenShared*>(shared_memory());
  const int64_t r = blockIdx.x;
  const int32_t id = index[r];
  const int channels = static_cast<int>(g.channels.value), tid = static_cast<int>(threadIdx.x);
  float* kept = statistics + r * 2 * channels;
  if (id < 0 || id >= g.tokens) {  // the whole block
    if (tid < 2 * channels) kept[tid] = blank(id);
    if (tid == 0) sums[r] = {blank(id), id == -1 ? 0.0 : 1.0};
    return;
  }
  const Pixel* in = clip + corner(g, r, id);
  const int step = kThreads / channels * channels;
  const int channel = tid % channels;
  Target target{0.0f, static_cast<float>(1.0 / unit)};
  if (normalize) {
    const double origin = pixel(in, g, n, channel);
    double sum = 0, squares = 0;
    if (tid < step) {
      for (int k = tid; k < g.row; k += step) {
        const double d = pixel(in, g, n, k) - origin;
        sum += d;
        squares += d * d;
      }
    }
    shared.sums[0][tid] = sum;
    shared.sums[1][tid] = squares;
    __syncthreads();
    if (tid < channels) {
      sum = squares = 0;
      for (int other = tid; other < step; other += channels) {
        sum += shared.sums[0][other];
        squares += shared.sums[1][other];
      }
      shared.targets[tid] = target_of(sum, squares, g.row / channels, origin, unit);
    }
    __syncthreads();
    target = shared.targets[channel];
  }
  if (tid < channels) {
    kept[tid] = target.centre;
    kept[channels + tid] = target.factor;
  }
  double loss = 0;
  if (tid < step) {
    for (int k = tid; k < g.row; k += step) {
      const float d = load(pred[r * g.row + k]) - (pixel(in, g, n, k) - target.centre) * target.factor;
      loss += d * d;
    }
  }
  loss = block_sum(loss, shared.scratch);
  if (tid == 0) sums[r] = {loss / g.row, 1.0};
}

template <class Pixel, class Pred>
__global__ void __launch_bounds__(kThreads)
    gradient_elements(const float* __restrict__ upstream, const Pred* __restrict__ pred, const Pixel* __restrict__ clip,
                      const int32_t* __restrict__ index, const __grid_constant__ Geometry g, const __grid_constant__ Affine n,
                      const float* __restrict__ statistics, const int64_t* __restrict__ count, Denominator denominator,
                      Pred* __restrict__ grad) {
  const int64_t r = blockIdx.x;
  const int32_t id = index[r];
  const int channels = static_cast<int>(g.channels.value), tid = static_cast<int>(threadIdx.x);
  Pred* out = grad + r * g.row;
  if (id < 0 || id >= g.tokens) {
    for (int k = tid; k < g.row; k += kThreads) store(out[k], blank(id));
    return;
  }
  const Pixel* in = clip + corner(g, r, id);
  const int step = kThreads / channels * channels;
  if (tid >= step) return;
  const float* kept = statistics + r * 2 * channels + tid % channels;
  const float centre = kept[0], factor = kept[channels];
  const float scale = gradient_scale(upstream, count, denominator, 2.0 / g.row);
  for (int k = tid; k < g.row; k += step) {
    store(out[k], (load(pred[r * g.row + k]) - (pixel(in, g, n, k) - centre) * factor) * scale);
  }
}

constexpr int kSumThreads = 512;

// Loss and count of what the blocks above left behind, by one block.
__global__ void __launch_bounds__(kSumThreads)
    add_up(const double2* __restrict__ sums, int count, Denominator denominator, float* __restrict__ loss_out,
           int64_t* __restrict__ count_out) {
  auto* scratch = reinterpret_cast<double*>(shared_memory());
  double loss = 0, valid = 0;
#pragma unroll 4
  for (int i = threadIdx.x; i < count; i += kSumThreads) {
    loss += sums[i].x;
    valid += sums[i].y;
  }
  loss = block_sum(loss, scratch);
  valid = block_sum(valid, scratch + kSumThreads / kWarp);
  if (threadIdx.x == 0) {
    *count_out = static_cast<int64_t>(valid);
    *loss_out = static_cast<float>(loss) / denominator.of(static_cast<int64_t>(valid));
  }
}

// The groups above read and write whole vectors.
template <class Body>
bool with_byte_groups(const Reconstruction& in, const void* rows, Body&& body) {
  return aligned(in.pred, 16) && aligned(rows, 16) && with_byte_token(in.clip_dtype, in.shape, in.clip, body);
}

int64_t byte_blocks(int64_t total) { return (total + kTokensPerBlock - 1) / kTokensPerBlock; }

}  // namespace
}  // namespace cuda

void reconstruction_loss(const Reconstruction& in, bool normalize, int64_t divisor, float* statistics, float* loss,
                         int64_t* count_out, double* scratch, const Queue& queue) {
  using namespace cuda;
  constexpr const char* op = "reconstruction_loss";
  const Geometry g = geometry(op, in.clip_dtype, in.shape, in.count);
  const Affine n = Affine::of(op, in.shape, in.std, in.mean);
  if (normalize && in.shape.tubelet * in.shape.patch * in.shape.patch < 2) {
    throw std::invalid_argument("reconstruction_loss: a patch of one pixel has no variance");
  }
  const int64_t total = in.shape.batch * in.count;
  auto* sums = reinterpret_cast<double2*>(scratch);
  int64_t blocks = total;
  with_device_float(in.pred_dtype, op, [&](auto pred_type) {
    using Pred = decltype(pred_type);
    const auto* pred = static_cast<const Pred*>(in.pred);
    const bool done = with_byte_groups(in, in.pred, [&](auto patch) {
      blocks = byte_blocks(total);
      launch(op, queue, loss_bytes<patch(), Pred>, blocks, kTokensPerBlock * kWarp,
             sizeof(LossShared) + kTokensPerBlock * ByteToken<patch()>::staged, pred, static_cast<const uint8_t*>(in.clip),
             in.index, static_cast<uint32_t>(total), g, normalize, statistics, sums);
    });
    if (done) return;
    with_device_pixel(in.clip_dtype, op, [&](auto pixel_type) {
      using Pixel = decltype(pixel_type);
      launch(op, queue, loss_elements<Pixel, Pred>, total, kThreads, sizeof(TokenShared), pred,
             static_cast<const Pixel*>(in.clip), in.index, g, n, normalize, statistics, sums);
    });
  });
  launch(op, queue, add_up, 1, kSumThreads, 2 * kSumThreads / kWarp * sizeof(double), sums, static_cast<int>(blocks),
         Denominator{divisor}, loss, count_out);
}

void reconstruction_loss_backward(const float* upstream, const Reconstruction& in, const float* statistics,
                                  const int64_t* count, int64_t divisor, void* grad, const Queue& queue) {
  using namespace cuda;
  constexpr const char* op = "reconstruction_loss_backward";
  const Geometry g = geometry(op, in.clip_dtype, in.shape, in.count);
  const Affine n = Affine::of(op, in.shape, in.std, in.mean);
  const int64_t total = in.shape.batch * in.count;
  with_device_float(in.pred_dtype, op, [&](auto pred_type) {
    using Pred = decltype(pred_type);
    const auto* pred = static_cast<const Pred*>(in.pred);
    auto* out = static_cast<Pred*>(grad);
    const bool done = with_byte_groups(in, grad, [&](auto patch) {
      launch(op, queue, gradient_bytes<patch(), Pred>, byte_blocks(total), kTokensPerBlock * kWarp,
             kTokensPerBlock * ByteToken<patch()>::staged, upstream, pred, static_cast<const uint8_t*>(in.clip), in.index,
             static_cast<uint32_t>(total), g, statistics, count, Denominator{divisor}, out);
    });
    if (done) return;
    with_device_pixel(in.clip_dtype, op, [&](auto pixel_type) {
      using Pixel = decltype(pixel_type);
      launch(op, queue, gradient_elements<Pixel, Pred>, total, kThreads, 0, upstream, pred, static_cast<const Pixel*>(in.clip),
             in.index, g, n, statistics, count, Denominator{divisor}, out);
    });
  });
}

}  // namespace vmae2
