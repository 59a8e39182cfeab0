// Every native op: plain addresses, sizes and numbers; no torch, no Python. Implementations lie in cpu/<family>.cpp and
// cuda/<family>.cu.
//
// All arrays are dense and contiguous unless a comment says otherwise. On the CPU indices are checked: an id outside the grid
// throws std::out_of_range, an argument no kernel can take std::invalid_argument, both naming the op.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace vmae2 {

enum class Dtype : int { u8 = 0, f32 = 1, bf16 = 2, f16 = 3 };

// A clip and how it is cut into patches. uint8 clips lie as [batch, frames, height, width, channels], floating point
// clips as [batch, channels, frames, height, width].
struct Clip {
  int64_t batch, frames, height, width, channels, tubelet, patch;

  int64_t tokens() const { return (frames / tubelet) * (height / patch) * (width / patch); }
  int64_t row() const { return channels * tubelet * patch * patch; }
};

// masks.cpp. position, view: [batch]; outputs as described at the top of vmae2_fast/ops/masks.py.
struct MaskPlan {
  int64_t frames, height, width;
  uint64_t seed;
  std::string decoder;    // running_cell, none, frame, random, tube
  int64_t visible_sites;  // sites of a frame that the encoder sees
  int64_t kept;           // masked places of a cell (running_cell), or frames, tokens, sites kept
  int64_t decoded, loss;  // lengths of decode_index and loss_index
};
void dual_mask(const int64_t* position, const int64_t* view, int64_t batch, const MaskPlan& plan, int32_t* visible_index,
               int32_t* decode_index, int32_t* loss_index, int32_t* loss_slot, int threads);

// patches.cpp. index: [batch, count], -1 = row of zeros / no row; rows: [batch, count, row()].
void gather_patches(const void* clip, Dtype clip_dtype, const Clip& shape, const int32_t* index, int64_t count,
                    const std::vector<float>& scale, const std::vector<float>& shift, bool pixel_order, void* rows,
                    Dtype rows_dtype, int threads);
// clip: [batch, channels, frames, height, width] of the dtype of rows; every element is written, zeros where no row is.
void scatter_patches(const void* rows, Dtype dtype, const int32_t* index, int64_t count, const Clip& shape,
                     bool pixel_order, void* clip, int threads);

// reconstruction.cpp. pred, grad: [batch, count, row()] of pred_dtype; statistics: [batch, count, 2, channels], the centre and
// factor that make a target of a pixel (bytes of a uint8 clip as 0..255); loss and count_out, the number of tokens that count:
// scalars. The loss is divided by `divisor`, or where that is 0 by the count (at least 1).
struct Reconstruction {
  const void* pred;
  Dtype pred_dtype;
  const void* clip;
  Dtype clip_dtype;
  Clip shape;
  const int32_t* index;
  int64_t count;
  std::vector<float> mean, std;  // per channel, undo the normalisation of a floating point clip
};
void reconstruction_loss(const Reconstruction& in, bool normalize, int64_t divisor, float* statistics, float* loss,
                         int64_t* count_out, int threads);
void reconstruction_loss_backward(const float* upstream, const Reconstruction& in, const float* statistics,
                                  const int64_t* count, int64_t divisor, void* grad, int threads);

// resize.cpp. Cut windows out of uint8 frames and resize them: out is [views, frames, height, width, channels]. A row of
// `table` names one view: address of its source window relative to `buffer`, strides of frames and lines in bytes, height
// and width of the window, height and width of the grid it is resized to, first row and column of the grid to compute, flip;
// of YUV 4:2:0 frames, whose line stride is luma's, also addresses of the window's U and V, whether it begins with the second
// line and column of those that share them, and the six coefficients of the conversion. The second of these is zero for RGB.
constexpr int64_t kResizeColumns = 20;
void resize_crop(const uint8_t* buffer, int64_t bytes, const int64_t* table, int64_t views, int64_t frames, int64_t height,
                 int64_t width, int64_t channels, uint8_t* out, int threads);

// roi_align.cpp. features: [batch, height, width, channels]; boxes: [count, 5], (clip, x1, y1, x2, y2) in pixels; pooled, grad
// and where, the bin of each maximum: [count, channels]; out, the gradient of features, is written whole.
struct RoiAlign {
  const void* features;  // null in the backward
  Dtype dtype;
  int64_t batch, height, width, channels;
  const float* boxes;
  int64_t count, size;
  float scale;
  int64_t sampling;
  bool aligned;
};
void roi_align_max(const RoiAlign& in, void* pooled, uint8_t* where, int threads);
void roi_align_max_backward(const RoiAlign& in, const void* grad, const uint8_t* where, void* out, int threads);

// norm.cpp. x, branch, h: [batch, tokens, columns]; gamma, weight, bias: [columns]; drop: [batch]; mean, rstd: [batch, tokens].
// Without a branch branch, gamma, drop and x_new are null; gamma and drop may be null by themselves. In the backward x is x_new.
struct ResidualNorm {
  int64_t batch, tokens, columns;
  const void* x;
  Dtype x_dtype;
  const void* branch;
  Dtype branch_dtype;
  const float *gamma, *drop, *weight, *bias;
};
struct ResidualNormResults {
  float eps;
  void* x_new;  // of x's dtype
  void* h;
  Dtype h_dtype;
  float *mean, *rstd;
};
void residual_norm(const ResidualNorm& in, const ResidualNormResults& out, int threads);
struct ResidualNormGradients {
  const void* grad_x;  // of x's dtype, or null
  const void* grad_h;
  Dtype grad_dtype;
  const float *mean, *rstd;
  void* dx;                          // of x's dtype
  void* dbranch;                     // of the branch's dtype, or null
  float *dgamma, *dweight, *dbias;  // [columns], each null where it is not wanted; dgamma takes the branch
};
void residual_norm_backward(const ResidualNorm& in, const ResidualNormGradients& out, int threads);

// adamw.cpp. One step of AdamW on tensors that share their hyper-parameters; see vmae2_fast/ops/optim.py. `step` is a number, the
// updates a tensor has had. A shadow, null where there is none, gets the weights as bf16.
struct AdamWTensor {
  float* param;
  const float* grad;
  float *exp_avg, *exp_avg_sq, *step;
  uint16_t* shadow;
  int64_t count;
};
struct AdamW {
  double lr, beta1, beta2, eps, weight_decay;
  double scale;  // gradients are divided by it
  bool skipped;  // change nothing but the shadows
};
void adamw(const std::vector<AdamWTensor>& tensors, const AdamW& step, int threads);

// nms.cpp. segments: [count, 2], start and end; index, decayed: [count], what was taken and its score then, filled up with -1 and
// 0; of every label at most `limit`. method: hard, linear or gaussian.
void nms_1d(const double* segments, const double* scores, const int64_t* labels, int64_t count, const std::string& method,
            double iou_threshold, double sigma, double min_score, int64_t limit, int64_t* index, double* decayed);
// kept, out: [kept_count, 2].
void vote_1d(const double* kept, int64_t kept_count, const double* segments, const double* scores, int64_t count,
             double threshold, double* out, int threads);

// The same ops on a GPU's memory, queued on a stream: they return at once, and throw std::runtime_error if a launch fails.
// Looking at indices would mean waiting for them, so an id outside the grid gives NaN (scatter_patches: leaves its row out),
// never an access outside the clip, and of rows that scatter_patches would put at one token the last wins.
struct Queue {
  int device;
  uintptr_t stream;  // a cudaStream_t
};

void dual_mask(const int64_t* position, const int64_t* view, int64_t batch, const MaskPlan& plan, int32_t* visible_index,
               int32_t* decode_index, int32_t* loss_index, int32_t* loss_slot, const Queue& queue);
void gather_patches(const void* clip, Dtype clip_dtype, const Clip& shape, const int32_t* index, int64_t count,
                    const std::vector<float>& scale, const std::vector<float>& shift, bool pixel_order, void* rows,
                    Dtype rows_dtype, const Queue& queue);
void scatter_patches(const void* rows, Dtype dtype, const int32_t* index, int64_t count, const Clip& shape, bool pixel_order,
                     void* clip, const Queue& queue);
// scratch: [batch * count, 2], 16-byte aligned.
void reconstruction_loss(const Reconstruction& in, bool normalize, int64_t divisor, float* statistics, float* loss,
                         int64_t* count_out, double* scratch, const Queue& queue);
void reconstruction_loss_backward(const float* upstream, const Reconstruction& in, const float* statistics,
                                  const int64_t* count, int64_t divisor, void* grad, const Queue& queue);

}  // namespace vmae2
