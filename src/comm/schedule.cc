#include "comm/internal/schedule.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstring>

#include "comm/internal/reduce.h"

namespace meshloom::comm::detail {
namespace {

std::byte* bytes_in(const at::Tensor& tensor) {
  return static_cast<std::byte*>(const_cast<void*>(tensor.const_data_ptr()));
}

void add(std::vector<Block>& blocks, int peer, std::byte* data, std::int64_t bytes) {
  if (bytes > 0) blocks.push_back({peer, data, bytes});
}

void copy_bytes(std::byte* to, const std::byte* from, std::int64_t bytes) {
  if (bytes > 0 && to != from) std::memcpy(to, from, static_cast<std::size_t>(bytes));
}

// Peers in an order that differs by rank, so that not everybody sends to rank 0 first.
std::vector<int> peers_of(int rank, int size) {
  std::vector<int> peers;
  for (int step = 1; step < size; ++step) peers.push_back((rank + step) % size);
  return peers;
}

// Reduces the rows of `blocks` over all ranks: block r belongs to rank r. Piece k of every block
// travels in phase k; `publish` then adds what the owner does with its reduced piece.
struct Reducer {
  const Request& request;
  int rank;
  int size;
  std::int64_t element;              // bytes
  std::vector<std::int64_t> begins;  // first element of each block
  std::vector<std::int64_t> counts;  // elements of each block

  struct Range {
    std::int64_t begin = 0;
    std::int64_t count = 0;
  };
  Range piece(int owner, std::int64_t k, std::int64_t pieces) const {
    const std::int64_t from = counts[owner] * k / pieces;
    const std::int64_t to = counts[owner] * (k + 1) / pieces;
    return {begins[owner] + from, to - from};
  }

  std::int64_t pieces(const ScheduleLimits& limits) const {
    if (limits.single_phase) return 1;
    const std::int64_t largest = *std::max_element(counts.begin(), counts.end()) * element;
    return std::max<std::int64_t>(1, (largest + limits.piece_bytes - 1) / limits.piece_bytes);
  }

  // Phase k: contributions out and in, then the own piece reduced to `destination`.
  Phase exchange(std::int64_t k, std::int64_t count, std::byte* scratch,
                 std::byte* destination) const {
    Phase phase;
    std::byte* input = bytes_in(request.input);
    const Range own = piece(rank, k, count);
    for (const int peer : peers_of(rank, size)) {
      const Range theirs = piece(peer, k, count);
      add(phase.sends, peer, input + theirs.begin * element, theirs.count * element);
    }
    std::vector<const void*> sources(static_cast<std::size_t>(size));
    for (int r = 0; r < size; ++r) {
      if (r == rank) {
        sources[r] = input + own.begin * element;
      } else {
        add(phase.receives, r, scratch, own.count * element);
        sources[r] = scratch;
        scratch += own.count * element;
      }
    }
    phase.finish = [type = request.input.scalar_type(), op = request.reduce,
                    sources = std::move(sources), destination, elements = own.count] {
      void* const destinations[] = {destination};
      if (elements > 0) reduce_range(type, op, sources, destinations, 0, elements);
    };
    return phase;
  }

  at::Tensor scratch(std::int64_t count) const {
    std::int64_t largest = 0;
    for (std::int64_t k = 0; k < count; ++k)
      largest = std::max(largest, piece(rank, k, count).count);
    return at::empty({largest * element * (size - 1)}, at::kByte);
  }
};

void all_reduce_whole(Schedule& schedule, const Request& request, int rank, int size) {
  const auto bytes = static_cast<std::int64_t>(request.input.nbytes());
  std::byte* data = bytes_in(request.output);
  schedule.scratch.push_back(at::empty({bytes * (size - 1)}, at::kByte));
  std::byte* scratch = bytes_in(schedule.scratch.back());
  Phase phase;
  for (const int peer : peers_of(rank, size)) add(phase.sends, peer, data, bytes);
  std::vector<const void*> sources;
  for (int r = 0; r < size; ++r) {
    if (r == rank) {
      sources.push_back(data);
    } else {
      add(phase.receives, r, scratch, bytes);
      sources.push_back(scratch);
      scratch += bytes;
    }
  }
  phase.finish = [sources = std::move(sources), data, elements = request.input.numel(),
                  type = request.input.scalar_type(), op = request.reduce] {
    void* const destinations[] = {data};
    if (elements > 0) reduce_range(type, op, sources, destinations, 0, elements);
  };
  schedule.phases.push_back(std::move(phase));
}

void all_reduce(Schedule& schedule, const Request& request, int rank, int size,
                const ScheduleLimits& limits) {
  if (size == 1) return;
  if (limits.single_phase ||
      static_cast<std::int64_t>(request.input.nbytes()) <= limits.small_bytes) {
    return all_reduce_whole(schedule, request, rank, size);
  }
  Reducer reducer{request, rank, size, static_cast<std::int64_t>(request.input.element_size()),
                  {},      {}};
  const std::int64_t elements = request.input.numel();
  for (int r = 0; r < size; ++r) {
    reducer.begins.push_back(elements * r / size);
    reducer.counts.push_back(elements * (r + 1) / size - elements * r / size);
  }
  const std::int64_t pieces = reducer.pieces(limits);
  schedule.scratch.push_back(reducer.scratch(pieces));
  std::byte* data = bytes_in(request.output);
  // While piece k is reduced, the result of piece k - 1 is handed round.
  for (std::int64_t k = 0; k <= pieces; ++k) {
    Phase phase;
    if (k < pieces) {
      phase = reducer.exchange(k, pieces, bytes_in(schedule.scratch.back()),
                               data + reducer.piece(rank, k, pieces).begin * reducer.element);
    }
    if (k > 0) {
      const auto own = reducer.piece(rank, k - 1, pieces);
      for (const int peer : peers_of(rank, size)) {
        const auto theirs = reducer.piece(peer, k - 1, pieces);
        add(phase.sends, peer, data + own.begin * reducer.element, own.count * reducer.element);
        add(phase.receives, peer, data + theirs.begin * reducer.element,
            theirs.count * reducer.element);
      }
    }
    schedule.phases.push_back(std::move(phase));
  }
}

void reduce_scatter(Schedule& schedule, const Request& request, int rank, int size,
                    const ScheduleLimits& limits) {
  Reducer reducer{request, rank, size, static_cast<std::int64_t>(request.input.element_size()),
                  {},      {}};
  const std::int64_t row = row_bytes(request.input) / reducer.element;
  std::int64_t begin = 0;
  for (const std::int64_t rows : request.send_rows) {
    reducer.begins.push_back(begin);
    reducer.counts.push_back(rows * row);
    begin += rows * row;
  }
  const std::int64_t pieces = reducer.pieces(limits);
  schedule.scratch.push_back(reducer.scratch(pieces));
  for (std::int64_t k = 0; k < pieces; ++k) {
    const auto own = reducer.piece(rank, k, pieces);
    std::byte* destination =
        bytes_in(request.output) + (own.begin - reducer.begins[rank]) * reducer.element;
    schedule.phases.push_back(
        reducer.exchange(k, pieces, bytes_in(schedule.scratch.back()), destination));
  }
}

void all_to_all(Schedule& schedule, const Request& request, int rank, int size) {
  const std::int64_t row = row_bytes(request.input);
  std::vector<std::byte*> from(static_cast<std::size_t>(size));
  std::vector<std::byte*> to(static_cast<std::size_t>(size));
  std::byte* in = bytes_in(request.input);
  std::byte* out = bytes_in(request.output);
  for (int r = 0; r < size; ++r) {
    from[r] = in;
    to[r] = out;
    in += request.send_rows[r] * row;
    out += request.recv_rows[r] * row;
  }
  copy_bytes(to[rank], from[rank], request.send_rows[rank] * row);
  Phase phase;
  for (const int peer : peers_of(rank, size)) {
    add(phase.sends, peer, from[peer], request.send_rows[peer] * row);
    add(phase.receives, peer, to[peer], request.recv_rows[peer] * row);
  }
  schedule.phases.push_back(std::move(phase));
}

void all_gather(Schedule& schedule, const Request& request, int rank, int size) {
  const std::int64_t row = row_bytes(request.input);
  std::byte* out = bytes_in(request.output);
  std::byte* in = bytes_in(request.input);
  Phase phase;
  for (const int peer : peers_of(rank, size)) {
    add(phase.sends, peer, in, request.recv_rows[rank] * row);
  }
  for (int r = 0; r < size; ++r) {
    const std::int64_t bytes = request.recv_rows[r] * row;
    if (r == rank) {
      copy_bytes(out, in, bytes);
    } else {
      add(phase.receives, r, out, bytes);
    }
    out += bytes;
  }
  schedule.phases.push_back(std::move(phase));
}

// Small: down a binomial tree. Large: the root deals slices out, then all hand them round, so that
// the root sends the tensor about twice and not once per rank.
void broadcast(Schedule& schedule, const Request& request, int rank, int size,
               const ScheduleLimits& limits) {
  const auto bytes = static_cast<std::int64_t>(request.input.nbytes());
  std::byte* data = bytes_in(request.output);
  if (limits.single_phase) {
    Phase phase;
    if (rank != request.root) {
      add(phase.receives, request.root, data, bytes);
    } else {
      for (const int peer : peers_of(rank, size)) add(phase.sends, peer, data, bytes);
    }
    schedule.phases.push_back(std::move(phase));
    return;
  }
  if (size > 2 && bytes > limits.small_bytes) {
    const auto slice = [&](std::vector<Block>& blocks, int peer, int index) {
      const std::int64_t begin = bytes * index / size;
      add(blocks, peer, data + begin, bytes * (index + 1) / size - begin);
    };
    Phase deal;
    Phase round;
    if (rank == request.root) {
      for (const int peer : peers_of(rank, size)) {
        slice(deal.sends, peer, peer);
        slice(round.sends, peer, rank);
      }
    } else {
      slice(deal.receives, request.root, rank);
      for (const int peer : peers_of(rank, size)) {
        if (peer != request.root) slice(round.sends, peer, rank);
        slice(round.receives, peer, peer);
      }
    }
    schedule.phases.push_back(std::move(deal));
    schedule.phases.push_back(std::move(round));
    return;
  }
  const int place = (rank - request.root + size) % size;  // 0 is the root
  Phase receive;
  Phase send;
  int bit = 1;
  while (bit < size && (place & bit) == 0) bit <<= 1;
  if (place != 0) add(receive.receives, (place - bit + request.root) % size, data, bytes);
  for (bit >>= 1; bit > 0; bit >>= 1) {
    if (place + bit < size) add(send.sends, (place + bit + request.root) % size, data, bytes);
  }
  schedule.phases.push_back(std::move(receive));
  schedule.phases.push_back(std::move(send));
}

void barrier(Schedule& schedule, int rank, int size, const ScheduleLimits& limits) {
  Phase phase;
  for (int step = 1; step < size; step = limits.single_phase ? step + 1 : step * 2) {
    phase.sends.push_back({(rank + step) % size, nullptr, 0});
    phase.receives.push_back({(rank - step + size) % size, nullptr, 0});
    if (!limits.single_phase) schedule.phases.push_back(std::exchange(phase, {}));
  }
  if (!phase.sends.empty()) schedule.phases.push_back(std::move(phase));
}

}  // namespace

Schedule make_schedule(const Request& request, int rank, int size, const ScheduleLimits& limits) {
  Schedule schedule;
  switch (request.operation) {
    case Operation::kAllReduce:
      all_reduce(schedule, request, rank, size, limits);
      break;
    case Operation::kAllGather:
      all_gather(schedule, request, rank, size);
      break;
    case Operation::kReduceScatter:
      reduce_scatter(schedule, request, rank, size, limits);
      break;
    case Operation::kAllToAll:
      all_to_all(schedule, request, rank, size);
      break;
    case Operation::kBroadcast:
      broadcast(schedule, request, rank, size, limits);
      break;
    case Operation::kBarrier:
      barrier(schedule, rank, size, limits);
      break;
    case Operation::kSendReceive: {
      Phase phase;
      for (const Message& send : request.sends) {
        phase.sends.push_back(
            {send.peer, bytes_in(send.tensor), static_cast<std::int64_t>(send.tensor.nbytes())});
      }
      for (const Message& receive : request.receives) {
        phase.receives.push_back({receive.peer, bytes_in(receive.tensor),
                                  static_cast<std::int64_t>(receive.tensor.nbytes())});
      }
      schedule.phases.push_back(std::move(phase));
      break;
    }
  }
  return schedule;
}

}  // namespace meshloom::comm::detail
