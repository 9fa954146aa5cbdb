#include "meshloom/model/tensor_block.h"

#include <cstddef>
#include <utility>

namespace meshloom::model {
namespace {

void append_blocks(const std::vector<std::int64_t>& shape, std::size_t dim, TensorBlock prefix,
                   std::int64_t begin, std::int64_t end, std::vector<TensorBlock>& result) {
  if (begin >= end) return;
  if (dim == shape.size()) {
    result.push_back(std::move(prefix));
    return;
  }
  std::int64_t stride = 1;
  for (std::size_t d = dim + 1; d < shape.size(); ++d) stride *= shape[d];
  const auto rows = [&](std::int64_t first, std::int64_t last) {
    if (first >= last) return;
    TensorBlock block = prefix;
    block.offset.push_back(first);
    block.extent.push_back(last - first);
    for (std::size_t d = dim + 1; d < shape.size(); ++d) {
      block.offset.push_back(0);
      block.extent.push_back(shape[d]);
    }
    result.push_back(std::move(block));
  };
  const auto inside = [&](std::int64_t row, std::int64_t from, std::int64_t to) {
    TensorBlock inner = prefix;
    inner.offset.push_back(row);
    inner.extent.push_back(1);
    append_blocks(shape, dim + 1, std::move(inner), from, to, result);
  };
  const std::int64_t first = begin / stride;
  const std::int64_t last = end / stride;
  const std::int64_t head = begin % stride;
  const std::int64_t tail = end % stride;
  if (first == last) {
    inside(first, head, tail);
    return;
  }
  if (head != 0) inside(first, head, stride);
  rows(first + (head != 0 ? 1 : 0), last);
  if (tail != 0) inside(last, 0, tail);
}

}  // namespace

std::int64_t TensorBlock::elements() const {
  std::int64_t result = 1;
  for (const std::int64_t size : extent) result *= size;
  return result;
}

std::vector<TensorBlock> blocks_of_range(const std::vector<std::int64_t>& shape, std::int64_t begin,
                                         std::int64_t end) {
  std::vector<TensorBlock> result;
  append_blocks(shape, 0, {}, begin, end, result);
  return result;
}

}  // namespace meshloom::model
