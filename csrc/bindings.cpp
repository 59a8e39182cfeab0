// The only file that knows Python: addresses come in as integers, the GIL is released around the work, and C++ exceptions
// become Python ones (std::invalid_argument -> ValueError, std::out_of_range -> IndexError). The Python side,
// vmae2_fast/ops/_native.py, has checked what an address cannot tell: dtype, density, device.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <utility>

#include "build_info.h"
#include "cpu/isa.h"
#include "ops.h"

namespace py = pybind11;

namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

constexpr bool kCuda =
#ifdef VMAE2_WITH_CUDA
    true;
#else
    false;
#endif

// Where an op runs is its last argument: a number of threads in C++, the pair (device, stream) in CUDA.
int where(int threads) { return threads; }

vmae2::Queue where(const std::pair<int, uintptr_t>& queue) { return {queue.first, queue.second}; }

template <class Where>
void define_ops(py::module_& m, const std::string& suffix) {
  using namespace vmae2;
  using release = py::call_guard<py::gil_scoped_release>;

  m.def(("dual_mask" + suffix).c_str(),
        [](uintptr_t position, uintptr_t view, int64_t batch, int64_t frames, int64_t height, int64_t width, uint64_t seed,
           const std::string& decoder, int64_t visible_sites, int64_t kept, int64_t decoded, int64_t loss, uintptr_t visible_index,
           uintptr_t decode_index, uintptr_t loss_index, uintptr_t loss_slot, const Where& there) {
          dual_mask(at<const int64_t>(position), at<const int64_t>(view), batch,
                    {frames, height, width, seed, decoder, visible_sites, kept, decoded, loss}, at<int32_t>(visible_index),
                    at<int32_t>(decode_index), at<int32_t>(loss_index), at<int32_t>(loss_slot), where(there));
        },
        release());

  m.def(("gather_patches" + suffix).c_str(),
        [](uintptr_t clip, int clip_dtype, int64_t batch, int64_t frames, int64_t height, int64_t width, int64_t channels,
           int64_t tubelet, int64_t patch, uintptr_t index, int64_t count, const std::vector<float>& scale,
           const std::vector<float>& shift, bool pixel_order, uintptr_t rows, int rows_dtype, const Where& there) {
          gather_patches(at<const void>(clip), Dtype(clip_dtype), {batch, frames, height, width, channels, tubelet, patch},
                         at<const int32_t>(index), count, scale, shift, pixel_order, at<void>(rows), Dtype(rows_dtype), where(there));
        },
        release());

  m.def(("scatter_patches" + suffix).c_str(),
        [](uintptr_t rows, int dtype, uintptr_t index, int64_t count, int64_t batch, int64_t frames, int64_t height,
           int64_t width, int64_t channels, int64_t tubelet, int64_t patch, bool pixel_order, uintptr_t clip, const Where& there) {
          scatter_patches(at<const void>(rows), Dtype(dtype), at<const int32_t>(index), count,
                          {batch, frames, height, width, channels, tubelet, patch}, pixel_order, at<void>(clip), where(there));
        },
        release());

  m.def(("reconstruction_loss_backward" + suffix).c_str(),
        [](uintptr_t upstream, uintptr_t pred, int pred_dtype, uintptr_t clip, int clip_dtype, int64_t batch, int64_t frames,
           int64_t height, int64_t width, int64_t channels, int64_t tubelet, int64_t patch, uintptr_t index, int64_t count,
           const std::vector<float>& mean, const std::vector<float>& std, uintptr_t statistics, uintptr_t valid, int64_t divisor,
           uintptr_t grad, const Where& there) {
          reconstruction_loss_backward(at<const float>(upstream),
                                       {at<const void>(pred), Dtype(pred_dtype), at<const void>(clip), Dtype(clip_dtype),
                                        {batch, frames, height, width, channels, tubelet, patch}, at<const int32_t>(index),
                                        count, mean, std},
                                       at<const float>(statistics), at<const int64_t>(valid), divisor, at<void>(grad), where(there));
        },
        release());
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  using namespace vmae2;
  using release = py::call_guard<py::gil_scoped_release>;
  m.doc() = "Native kernels of vmae2_fast. Call them through vmae2_fast.ops.";

  m.def("cuda_available", [] { return kCuda; }, "Whether CUDA kernels were compiled in.");
  m.def("build_info", [] {
    py::dict info;
    info["version"] = VMAE2_VERSION;
    info["compiler"] = compiler();
    info["openmp"] = openmp();
    info["flags"] = VMAE2_FLAGS;
    info["cpu_features"] = cpu_features();
    info["cpu_isa"] = cpu_isa_name();
    info["cuda"] = kCuda;
    return info;
  });

  m.def("supported_cpu_isas", &supported_cpu_isas, "Instruction sets the CPU kernels can use here, the narrowest first.");
  m.def("set_cpu_isa", &set_cpu_isa, "Make the CPU kernels use one of them: for tests, all give the same bits.");

  define_ops<int>(m, "");
  m.def("reconstruction_loss",
        [](uintptr_t pred, int pred_dtype, uintptr_t clip, int clip_dtype, int64_t batch, int64_t frames, int64_t height,
           int64_t width, int64_t channels, int64_t tubelet, int64_t patch, uintptr_t index, int64_t count,
           const std::vector<float>& mean, const std::vector<float>& std, bool normalize, int64_t divisor,
           uintptr_t statistics, uintptr_t loss, uintptr_t count_out, int threads) {
          reconstruction_loss({at<const void>(pred), Dtype(pred_dtype), at<const void>(clip), Dtype(clip_dtype),
                               {batch, frames, height, width, channels, tubelet, patch}, at<const int32_t>(index), count, mean, std},
                              normalize, divisor, at<float>(statistics), at<float>(loss), at<int64_t>(count_out), threads);
        },
        release());

  m.def("resize_crop",
        [](uintptr_t buffer, int64_t bytes, uintptr_t table, int64_t views, int64_t frames, int64_t height, int64_t width,
           int64_t channels, uintptr_t out, int threads) {
          resize_crop(at<const uint8_t>(buffer), bytes, at<const int64_t>(table), views, frames, height, width, channels,
                      at<uint8_t>(out), threads);
        },
        release());

  m.def("roi_align_max",
        [](uintptr_t features, int dtype, int64_t batch, int64_t height, int64_t width, int64_t channels, uintptr_t boxes,
           int64_t count, int64_t size, float scale, int64_t sampling, bool aligned, uintptr_t pooled, uintptr_t where,
           int threads) {
          roi_align_max({at<const void>(features), Dtype(dtype), batch, height, width, channels, at<const float>(boxes), count,
                         size, scale, sampling, aligned},
                        at<void>(pooled), at<uint8_t>(where), threads);
        },
        release());
  m.def("roi_align_max_backward",
        [](uintptr_t grad, int dtype, int64_t batch, int64_t height, int64_t width, int64_t channels, uintptr_t boxes,
           int64_t count, int64_t size, float scale, int64_t sampling, bool aligned, uintptr_t where, uintptr_t out,
           int threads) {
          roi_align_max_backward({nullptr, Dtype(dtype), batch, height, width, channels, at<const float>(boxes), count, size,
                                  scale, sampling, aligned},
                                 at<const void>(grad), at<const uint8_t>(where), at<void>(out), threads);
        },
        release());

  m.def("residual_norm",
        [](int64_t batch, int64_t tokens, int64_t columns, uintptr_t x, int x_dtype, uintptr_t branch, int branch_dtype,
           uintptr_t gamma, uintptr_t drop, uintptr_t weight, uintptr_t bias, float eps, uintptr_t x_new, uintptr_t h, int h_dtype,
           uintptr_t mean, uintptr_t rstd, int threads) {
          residual_norm({batch, tokens, columns, at<const void>(x), Dtype(x_dtype), at<const void>(branch), Dtype(branch_dtype),
                         at<const float>(gamma), at<const float>(drop), at<const float>(weight), at<const float>(bias)},
                        {eps, at<void>(x_new), at<void>(h), Dtype(h_dtype), at<float>(mean), at<float>(rstd)}, threads);
        },
        release());
  m.def("residual_norm_backward",
        [](int64_t batch, int64_t tokens, int64_t columns, uintptr_t x, int x_dtype, uintptr_t branch, int branch_dtype,
           uintptr_t gamma, uintptr_t drop, uintptr_t weight, uintptr_t grad_x, uintptr_t grad_h, int grad_dtype, uintptr_t mean,
           uintptr_t rstd, uintptr_t dx, uintptr_t dbranch, uintptr_t dgamma, uintptr_t dweight, uintptr_t dbias, int threads) {
          residual_norm_backward(
              {batch, tokens, columns, at<const void>(x), Dtype(x_dtype), at<const void>(branch), Dtype(branch_dtype),
               at<const float>(gamma), at<const float>(drop), at<const float>(weight), nullptr},
              {at<const void>(grad_x), at<const void>(grad_h), Dtype(grad_dtype), at<const float>(mean), at<const float>(rstd),
               at<void>(dx), at<void>(dbranch), at<float>(dgamma), at<float>(dweight), at<float>(dbias)},
              threads);
        },
        release());

  m.def("adamw",
        [](const std::vector<uintptr_t>& params, const std::vector<uintptr_t>& grads, const std::vector<uintptr_t>& exp_avgs,
           const std::vector<uintptr_t>& exp_avg_sqs, const std::vector<uintptr_t>& steps, const std::vector<uintptr_t>& shadows,
           const std::vector<int64_t>& counts, double lr, double beta1, double beta2, double eps, double weight_decay,
           double scale, bool skipped, int threads) {
          std::vector<AdamWTensor> tensors;
          for (size_t i = 0; i < params.size(); ++i) {
            tensors.push_back({at<float>(params.at(i)), at<const float>(grads.at(i)), at<float>(exp_avgs.at(i)),
                               at<float>(exp_avg_sqs.at(i)), at<float>(steps.at(i)), at<uint16_t>(shadows.at(i)), counts.at(i)});
          }
          adamw(tensors, {lr, beta1, beta2, eps, weight_decay, scale, skipped}, threads);
        },
        release());

  m.def("nms_1d",
        [](uintptr_t segments, uintptr_t scores, uintptr_t labels, int64_t count, const std::string& method, double iou_threshold,
           double sigma, double min_score, int64_t limit, uintptr_t index, uintptr_t decayed) {
          nms_1d(at<const double>(segments), at<const double>(scores), at<const int64_t>(labels), count, method, iou_threshold,
                 sigma, min_score, limit, at<int64_t>(index), at<double>(decayed));
        },
        release());
  m.def("vote_1d",
        [](uintptr_t kept, int64_t kept_count, uintptr_t segments, uintptr_t scores, int64_t count, double threshold,
           uintptr_t out, int threads) {
          vote_1d(at<const double>(kept), kept_count, at<const double>(segments), at<const double>(scores), count, threshold,
                  at<double>(out), threads);
        },
        release());

#ifdef VMAE2_WITH_CUDA
  define_ops<std::pair<int, uintptr_t>>(m, "_cuda");
  m.def("reconstruction_loss_cuda",
        [](uintptr_t pred, int pred_dtype, uintptr_t clip, int clip_dtype, int64_t batch, int64_t frames, int64_t height,
           int64_t width, int64_t channels, int64_t tubelet, int64_t patch, uintptr_t index, int64_t count,
           const std::vector<float>& mean, const std::vector<float>& std, bool normalize, int64_t divisor,
           uintptr_t statistics, uintptr_t loss, uintptr_t count_out, uintptr_t scratch,
           const std::pair<int, uintptr_t>& queue) {
          reconstruction_loss({at<const void>(pred), Dtype(pred_dtype), at<const void>(clip), Dtype(clip_dtype),
                               {batch, frames, height, width, channels, tubelet, patch}, at<const int32_t>(index), count, mean, std},
                              normalize, divisor, at<float>(statistics), at<float>(loss), at<int64_t>(count_out),
                              at<double>(scratch), where(queue));
        },
        release());
#endif
}
