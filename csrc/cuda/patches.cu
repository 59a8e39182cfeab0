// Patches by index on the GPU: gather rows from a clip, scatter rows into one. See vmae2_fast/ops/patches.py.
#include "token.cuh"

namespace vmae2 {
namespace cuda {
namespace {

// Tokens of the models in order (c, t, y, x): a warp a token, lines through shared memory, rows in vectors of 16 bytes.
constexpr int kTokensPerBlock = 8;

template <int PATCH, class Row>
__global__ void __launch_bounds__(kTokensPerBlock* kWarp)
    gather_bytes(const uint8_t* __restrict__ clip, const int32_t* __restrict__ index, Row* __restrict__ rows, uint32_t total,
                 const __grid_constant__ Geometry g, const __grid_constant__ Affine n) {
  using Token = ByteToken<PATCH>;
  constexpr int size = Vector<Row>::size;
  static_assert(PATCH % 2 == 0 && Token::row % size == 0, "pairs of pixels stay in a line, vectors in a row");
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const uint32_t r = blockIdx.x * kTokensPerBlock + warp;
  if (r >= total) return;  // whole warps only, and no barrier but the warp's follows
  const int32_t id = index[r];
  auto* out = reinterpret_cast<Vector<Row>*>(rows + static_cast<int64_t>(r) * Token::row);
  if (id < 0 || id >= g.tokens) {
    for (int m = lane; m < Token::row / size; m += kWarp) out[m] = filled<Row>(id == -1 ? 0.0f : nan());
    return;
  }
  const Token token{clip + corner(g, r, id), g.layout.frame, g.layout.line, shared_memory() + warp * Token::staged};
  token.stage(lane);
  __syncwarp();
  for (int m = lane; m < Token::row / size; m += kWarp) {
    int c = m * size / (Token::lines * PATCH), l = m * size / PATCH % Token::lines, x = m * size % PATCH;
    Vector<Row> vector;
#pragma unroll
    for (int j = 0; j < size; j += 2) {
      const float scale = c == 0 ? n.scale[0] : c == 1 ? n.scale[1] : n.scale[2];
      const float shift = c == 0 ? n.shift[0] : c == 1 ? n.shift[1] : n.shift[2];
      const uint8_t* in = token.bytes(l) + x * Token::channels + c;
      store2(vector.values + j, affine(in[0], scale, shift), affine(in[Token::channels], scale, shift));
      x += 2;
      if (PATCH % size != 0 && x == PATCH) {
        x = 0;
        if (++l == Token::lines) l = 0, ++c;
      }
    }
    out[m] = vector;
  }
}

// Any clip, any row: a block a token, an element a thread.
constexpr int kThreads = 128;

template <class Pixel, class Row>
__global__ void __launch_bounds__(kThreads)
    gather_elements(const Pixel* __restrict__ clip, const int32_t* __restrict__ index, Row* __restrict__ rows,
                    const __grid_constant__ Geometry g, const __grid_constant__ Affine n, bool pixel_order) {
  const uint32_t r = blockIdx.x;
  const int32_t id = index[r];
  Row* out = rows + static_cast<int64_t>(r) * g.row;
  if (id < 0 || id >= g.tokens) {
    for (int k = threadIdx.x; k < g.row; k += kThreads) store(out[k], id == -1 ? 0.0f : nan());
    return;
  }
  const Pixel* in = clip + corner(g, r, id);
  for (int k = threadIdx.x; k < g.row; k += kThreads) {
    const Place at = place(g, k, pixel_order);
    const Pixel pixel = in[offset(g.layout, at)];
    if constexpr (std::is_same_v<Pixel, uint8_t>) {
      store(out[k], affine(pixel, n.scale[at.channel], n.shift[at.channel]));
    } else if constexpr (std::is_same_v<Pixel, Row>) {
      out[k] = pixel;  // a copy, bit for bit
    } else {
      store(out[k], load(pixel));
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    scatter_elements(const T* __restrict__ rows, const int32_t* __restrict__ index, T* __restrict__ clip,
                     const __grid_constant__ Geometry g, bool pixel_order) {
  const uint32_t r = blockIdx.x;
  const int32_t id = index[r];
  uint32_t position;
  const uint32_t first = g.count.divide(r, position) * g.count.value;
  // Of rows that name one token the last wins, whichever block runs first.
  bool superseded = false;
  for (uint32_t k = position + 1 + threadIdx.x; k < g.count.value; k += kThreads) superseded |= index[first + k] == id;
  if (__syncthreads_or(superseded) || id < 0 || id >= g.tokens) return;
  const T* in = rows + static_cast<int64_t>(r) * g.row;
  T* out = clip + corner(g, r, id);
  for (int k = threadIdx.x; k < g.row; k += kThreads) out[offset(g.layout, place(g, k, pixel_order))] = in[k];
}

}  // namespace
}  // namespace cuda

void gather_patches(const void* clip, Dtype clip_dtype, const Clip& shape, const int32_t* index, int64_t count,
                    const std::vector<float>& scale, const std::vector<float>& shift, bool pixel_order, void* rows,
                    Dtype rows_dtype, const Queue& queue) {
  using namespace cuda;
  constexpr const char* op = "gather_patches";
  const Geometry g = geometry(op, clip_dtype, shape, count);
  const Affine n = Affine::of(op, shape, scale, shift);
  const int64_t total = shape.batch * count;
  with_device_float(rows_dtype, op, [&](auto row_type) {
    using Row = decltype(row_type);
    auto* out = static_cast<Row*>(rows);
    const bool done = !pixel_order && aligned(rows, 16) && with_byte_token(clip_dtype, shape, clip, [&](auto patch) {
      launch(op, queue, gather_bytes<patch(), Row>, (total + kTokensPerBlock - 1) / kTokensPerBlock, kTokensPerBlock * kWarp,
             kTokensPerBlock * ByteToken<patch()>::staged, static_cast<const uint8_t*>(clip), index, out,
             static_cast<uint32_t>(total), g, n);
    });
    if (done) return;
    with_device_pixel(clip_dtype, op, [&](auto pixel_type) {
      using Pixel = decltype(pixel_type);
      launch(op, queue, gather_elements<Pixel, Row>, total, kThreads, 0, static_cast<const Pixel*>(clip), index, out, g, n,
             pixel_order);
    });
  });
}

void scatter_patches(const void* rows, Dtype dtype, const int32_t* index, int64_t count, const Clip& shape, bool pixel_order,
                     void* clip, const Queue& queue) {
  using namespace cuda;
  constexpr const char* op = "scatter_patches";
  const Geometry g = geometry(op, dtype, shape, count);
  with_device_float(dtype, op, [&](auto type) {
    using T = decltype(type);
    fill_zeros(op, queue, clip, static_cast<size_t>(shape.batch * shape.tokens() * shape.row()) * sizeof(T));
    launch(op, queue, scatter_elements<T>, shape.batch * count, kThreads, 0, static_cast<const T*>(rows), index,
           static_cast<T*>(clip), g, pixel_order);
  });
}

}  // namespace vmae2
