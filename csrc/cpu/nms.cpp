// Suppression of segments on a line; see vmae2_fast/ops/nms.py. Doubles throughout, as there.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "../ops.h"
#include "parallel.h"

namespace vmae2 {
namespace {

constexpr double kStretch = 1e-6;

struct Candidate {
  double start, end, score;
  int64_t id;
};

enum class Method { hard, linear, gaussian };

Method method_of(const std::string& name) {
  if (name == "hard") return Method::hard;
  if (name == "linear") return Method::linear;
  if (name == "gaussian") return Method::gaussian;
  throw std::invalid_argument("nms_1d: unknown method " + name);
}

double overlap(double start, double end, double other_start, double other_end, double stretch) {
  const double common = std::max(0.0, std::min(end, other_end) - std::max(start, other_start));
  const double sum = (end - start + stretch) + (other_end - other_start + stretch) - common;
  return sum > 0 ? common / sum : 0.0;
}

}  // namespace

void nms_1d(const double* segments, const double* scores, const int64_t* labels, int64_t count, const std::string& name,
            double iou_threshold, double sigma, double min_score, int64_t limit, int64_t* index, double* decayed) {
  const Method method = method_of(name);
  std::vector<int64_t> by_label(static_cast<size_t>(count));
  std::iota(by_label.begin(), by_label.end(), int64_t{0});
  std::stable_sort(by_label.begin(), by_label.end(), [&](int64_t a, int64_t b) { return labels[a] < labels[b]; });
  int64_t taken = 0;
  std::vector<Candidate> left;
  for (int64_t begin = 0, end = 0; begin < count; begin = end) {
    left.clear();
    for (end = begin; end < count && labels[by_label[end]] == labels[by_label[begin]]; ++end) {
      const int64_t i = by_label[end];
      if (scores[i] >= min_score) left.push_back({segments[2 * i], segments[2 * i + 1], scores[i], i});
    }
    for (int64_t picks = 0; !left.empty() && picks < limit; ++picks) {
      size_t best = 0;
      for (size_t i = 1; i < left.size(); ++i) {
        if (left[i].score > left[best].score) best = i;
      }
      const Candidate chosen = left[best];
      index[taken] = chosen.id;
      decayed[taken++] = chosen.score;
      // In order, not by swapping the last one in: the first of equal scores is the first of the input.
      size_t out = 0;
      for (size_t i = 0; i < left.size(); ++i) {
        Candidate other = left[i];
        if (i == best) continue;
        const double u = overlap(chosen.start, chosen.end, other.start, other.end, kStretch);
        if (method == Method::hard) {
          if (u >= iou_threshold) continue;
        } else if (method == Method::linear) {
          if (u >= iou_threshold) other.score *= 1 - u;
        } else if (u > 0) {
          other.score *= std::exp(-(u * u) / sigma);
        }
        if (other.score >= min_score) left[out++] = other;
      }
      left.resize(out);
    }
  }
  std::fill(index + taken, index + count, int64_t{-1});
  std::fill(decayed + taken, decayed + count, 0.0);
}

void vote_1d(const double* kept, int64_t kept_count, const double* segments, const double* scores, int64_t count,
             double threshold, double* out, int threads) {
  parallel_for(kept_count, 8 * count, threads, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      double total = 0, start = 0, stop = 0;
      for (int64_t i = 0; i < count; ++i) {
        const double u = overlap(kept[2 * k], kept[2 * k + 1], segments[2 * i], segments[2 * i + 1], 0.0);
        if (u < threshold) continue;
        const double weight = scores[i] * u;
        total += weight;
        start += weight * segments[2 * i];
        stop += weight * segments[2 * i + 1];
      }
      out[2 * k] = total > 0 ? start / total : kept[2 * k];
      out[2 * k + 1] = total > 0 ? stop / total : kept[2 * k + 1];
    }
  });
}

}  // namespace vmae2
