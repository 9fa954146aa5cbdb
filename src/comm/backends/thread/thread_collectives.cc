#include <fmt/format.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <span>

#include "comm/backends/thread/thread_hub.h"
#include "comm/internal/reduce.h"

namespace meshloom::comm::detail {
namespace {

using Works = std::vector<std::shared_ptr<WorkImpl>>;

// A piece that one thread moves at a time; smaller calls are done by the posting thread alone.
constexpr std::int64_t kPieceBytes = 256 << 10;

// Either a copy (one source, destination null sources) or a reduction over a range of elements.
struct Piece {
  void* to = nullptr;
  const void* from = nullptr;
  std::int64_t bytes = 0;  // copies
  int target = 0;          // reductions: which entry of `Movement::reductions`
  std::int64_t begin = 0;
  std::int64_t end = 0;
};

struct Reduction {
  std::vector<const void*> sources;
  std::vector<void*> destinations;
};

struct Movement {
  Works works;
  c10::ScalarType type = c10::ScalarType::Byte;
  ReduceOp op = ReduceOp::kSum;
  std::vector<Reduction> reductions;
  std::vector<Piece> pieces;
  std::atomic<std::size_t> next{0};
  std::atomic<std::size_t> finished{0};
};

const std::byte* read_bytes(const at::Tensor& tensor) {
  return static_cast<const std::byte*>(tensor.const_data_ptr());
}

std::byte* write_bytes(const at::Tensor& tensor) {
  return static_cast<std::byte*>(tensor.mutable_data_ptr());
}

void add_copy(Movement& movement, std::byte* to, const std::byte* from, std::int64_t bytes) {
  if (to == from) return;
  for (std::int64_t at = 0; at < bytes; at += kPieceBytes) {
    Piece piece;
    piece.to = to + at;
    piece.from = from + at;
    piece.bytes = std::min(kPieceBytes, bytes - at);
    movement.pieces.push_back(piece);
  }
}

void add_reduction(Movement& movement, Reduction reduction, std::int64_t elements,
                   std::int64_t element_size) {
  const int target = static_cast<int>(movement.reductions.size());
  movement.reductions.push_back(std::move(reduction));
  const std::int64_t step = kPieceBytes / element_size;
  for (std::int64_t at = 0; at < elements; at += step) {
    Piece piece;
    piece.target = target;
    piece.begin = at;
    piece.end = std::min(elements, at + step);
    movement.pieces.push_back(piece);
  }
}

void plan_all_reduce(Movement& movement) {
  Reduction reduction;
  for (const auto& work : movement.works) {
    reduction.sources.push_back(read_bytes(work->request().input));
    reduction.destinations.push_back(write_bytes(work->request().output));
  }
  const at::Tensor& tensor = movement.works[0]->request().input;
  add_reduction(movement, std::move(reduction), tensor.numel(),
                static_cast<std::int64_t>(tensor.element_size()));
}

void plan_reduce_scatter(Movement& movement) {
  const Request& first = movement.works[0]->request();
  const std::int64_t row = row_bytes(first.input);
  const auto element = static_cast<std::int64_t>(first.input.element_size());
  std::int64_t offset = 0;
  for (std::size_t r = 0; r < movement.works.size(); ++r) {
    const std::int64_t bytes = first.send_rows[r] * row;
    Reduction reduction;
    for (const auto& work : movement.works) {
      reduction.sources.push_back(read_bytes(work->request().input) + offset);
    }
    reduction.destinations.push_back(write_bytes(movement.works[r]->request().output));
    add_reduction(movement, std::move(reduction), bytes / element, element);
    offset += bytes;
  }
}

void plan_all_gather(Movement& movement) {
  for (const auto& to : movement.works) {
    std::byte* out = write_bytes(to->request().output);
    for (const auto& from : movement.works) {
      const auto bytes = static_cast<std::int64_t>(from->request().input.nbytes());
      add_copy(movement, out, read_bytes(from->request().input), bytes);
      out += bytes;
    }
  }
}

void plan_all_to_all(Movement& movement) {
  const std::size_t size = movement.works.size();
  const std::int64_t row = row_bytes(movement.works[0]->request().input);
  std::vector<std::byte*> out;
  for (const auto& work : movement.works) out.push_back(write_bytes(work->request().output));
  for (std::size_t source = 0; source < size; ++source) {
    const Request& request = movement.works[source]->request();
    const std::byte* in = read_bytes(request.input);
    for (std::size_t target = 0; target < size; ++target) {
      const std::int64_t bytes = request.send_rows[target] * row;
      add_copy(movement, out[target], in, bytes);
      out[target] += bytes;
      in += bytes;
    }
  }
}

void plan_broadcast(Movement& movement) {
  const Request& root = movement.works[movement.works[0]->request().root]->request();
  for (const auto& work : movement.works) {
    add_copy(movement, write_bytes(work->request().output), read_bytes(root.input),
             static_cast<std::int64_t>(root.input.nbytes()));
  }
}

void complete_all(const Works& works) {
  for (const auto& work : works) work->complete();
}

// Takes pieces until none is left; whoever finishes the last one ends the calls.
void move_pieces(Movement& movement) {
  while (true) {
    const std::size_t taken = movement.next.fetch_add(1);
    if (taken >= movement.pieces.size()) return;
    const Piece& piece = movement.pieces[taken];
    if (piece.from != nullptr) {
      std::memcpy(piece.to, piece.from, static_cast<std::size_t>(piece.bytes));
    } else {
      const Reduction& reduction = movement.reductions[piece.target];
      reduce_range(movement.type, movement.op, reduction.sources, reduction.destinations,
                   piece.begin, piece.end);
    }
    if (movement.finished.fetch_add(1) + 1 == movement.pieces.size()) {
      complete_all(movement.works);
    }
  }
}

}  // namespace

std::string disagreement(const Works& works) {
  if (works[0]->request().operation != Operation::kAllToAll) return "";
  for (std::size_t source = 0; source < works.size(); ++source) {
    for (std::size_t target = 0; target < works.size(); ++target) {
      const auto sent = works[source]->request().send_rows[target];
      const auto expected = works[target]->request().recv_rows[source];
      if (sent != expected) {
        return fmt::format("all_to_all call {}: rank {} sends {} rows to rank {}, which expects {}",
                           works[0]->request().sequence, source, sent, target, expected);
      }
    }
  }
  return "";
}

void run_collective(Works works) {
  const Request& request = works[0]->request();
  // One rank reduces in place and copies nothing to itself.
  const auto movement = std::make_shared<Movement>();
  movement->works = std::move(works);
  movement->op = request.reduce;
  if (request.input.defined()) movement->type = request.input.scalar_type();
  switch (request.operation) {
    case Operation::kAllReduce:
      if (movement->works.size() > 1) plan_all_reduce(*movement);
      break;
    case Operation::kReduceScatter:
      plan_reduce_scatter(*movement);
      break;
    case Operation::kAllGather:
      plan_all_gather(*movement);
      break;
    case Operation::kAllToAll:
      plan_all_to_all(*movement);
      break;
    case Operation::kBroadcast:
      plan_broadcast(*movement);
      break;
    case Operation::kBarrier:
    case Operation::kSendReceive:
      break;
  }
  if (movement->pieces.empty()) {
    complete_all(movement->works);
    return;
  }
  if (movement->pieces.size() > movement->works.size() * movement->works.size()) {
    for (const auto& work : movement->works) {
      work->offer([movement] { move_pieces(*movement); });
    }
  }
  move_pieces(*movement);
}

}  // namespace meshloom::comm::detail
