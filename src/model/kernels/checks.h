#pragma once

#include <ATen/core/Tensor.h>

#include <initializer_list>
#include <numeric>
#include <span>
#include <sstream>
#include <string>

#include "meshloom/core/check.h"

namespace meshloom::model::kernels {

/// Checks rank and sizes (-1: any) of an argument; where and what name the call and the argument.
inline void check_shape(const at::Tensor& x, std::initializer_list<std::int64_t> shape,
                        const char* where, const char* what) {
  bool good = x.defined() && x.dim() == static_cast<std::int64_t>(shape.size());
  std::int64_t dim = 0;
  for (const std::int64_t size : shape) {
    if (!good) break;
    good = size < 0 || x.size(dim) == size;
    ++dim;
  }
  if (good) return;
  std::ostringstream text;
  text << what << " has shape ";
  if (x.defined()) {
    text << x.sizes();
  } else {
    text << "(undefined)";
  }
  text << ", expected [";
  dim = 0;
  for (const std::int64_t size : shape) {
    text << (dim++ > 0 ? ", " : "");
    if (size < 0) {
      text << '*';
    } else {
      text << size;
    }
  }
  text << ']';
  throw InvalidArgument(where, text.str());
}

inline void check_type(const at::Tensor& x, at::ScalarType type, const char* where,
                       const char* what) {
  if (x.scalar_type() == type) return;
  throw InvalidArgument(where, std::string(what) + " is " + c10::toString(x.scalar_type()) +
                                   ", expected " + c10::toString(type));
}

/// Counts of rows by group have to cover all rows.
inline void check_rows(std::span<const std::int64_t> rows, std::int64_t total, const char* where) {
  for (const std::int64_t count : rows) MESHLOOM_CHECK_GE(count, 0, where, "rows of a group");
  MESHLOOM_CHECK_EQ(std::accumulate(rows.begin(), rows.end(), std::int64_t{0}), total, where,
                    "sum of rows");
}

/// The tensor itself where its last dimension is contiguous, else a copy.
inline at::Tensor row_contiguous(const at::Tensor& x) {
  return x.dim() == 0 || x.stride(-1) == 1 || x.size(-1) <= 1 ? x : x.contiguous();
}

}  // namespace meshloom::model::kernels
