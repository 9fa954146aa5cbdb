// Attention on sizes: src/model/attention_layer.cc, latent_attention_layer.cc, local_engines.cc,
// kernels/attention_driver.cc, and the exchanges of src/parallel.

#include <cstdint>
#include <utility>

#include "plan/internal/memory_layers.h"

namespace meshloom::plan::detail {

void LayerMemory::exchange_forward(const MemoryFlow& flow) {
  if (flow.degree == 1) return;
  const std::int64_t others = flow.degree - 1;
  const std::int64_t keys = flow.all * key_value_heads_ * (model_.head_dim + model_.values()) * b_;
  const std::int64_t heads = flow.all * heads_ * (model_.head_dim + model_.values()) * b_;
  switch (flow.exchange) {
    case Exchange::kLocal:
      break;
    case Exchange::kAllGather:  // what is sent to the others and what comes from them
      need(keys_, others * keys * 3 / 2);
      break;
    case Exchange::kRing:  // packed, relayed, and two blocks that take turns
      need(keys_, others == 1 ? keys * 3 / 2 : 4 * keys);
      break;
    case Exchange::kUlysses:
    case Exchange::kRingUlysses:  // sent, received, sorted
      need(keys_, 3 * (keys + heads));
      break;
  }
}

void LayerMemory::exchange_backward(const MemoryFlow& flow) {
  if (flow.degree == 1) return;
  exchange_forward(flow);
  const std::int64_t others = flow.degree - 1;
  const std::int64_t keys = flow.all * key_value_heads_ * (model_.head_dim + model_.values()) * s_;
  const std::int64_t heads = flow.all * heads_ * (model_.head_dim + model_.values()) * s_;
  switch (flow.exchange) {
    case Exchange::kLocal:
      break;
    case Exchange::kAllGather:
      need(gradients_, others * keys * 3 / 2);
      break;
    case Exchange::kRing:  // two that take turns, what comes in, and what is sent on and home
      need(gradients_, others == 1 ? keys * 3 / 2 : 6 * keys);
      break;
    case Exchange::kUlysses:
    case Exchange::kRingUlysses:
      need(gradients_, 3 * (keys + heads));
      break;
  }
}

/// The output, and log-sum-exp as `pending`.
LayerMemory::Stream LayerMemory::attend(const MemoryFlow& flow) {
  exchange_forward(flow);
  Held out = work(flow.all * heads_ * model_.values() * s_);
  Held lse = work(flow.all * heads_ * s_);
  {
    const std::int64_t keys = flow.all * key_value_heads_ * model_.head_dim * s_;
    const std::int64_t values = flow.all * key_value_heads_ * model_.values() * s_;
    const std::int64_t queries = flow.all * heads_ * model_.head_dim * s_;
    const Held packed = work(keys);
    Held wide;
    if (b_ < s_) wide = work(queries + keys + values);
  }
  if (b_ < s_) out = work(flow.all * heads_ * model_.values() * b_);
  return {std::move(out), std::move(lse)};
}

/// Gradients of queries, keys and values.
Held LayerMemory::attend_backward(const MemoryFlow& flow) {
  exchange_backward(flow);
  const std::int64_t queries = flow.all * heads_ * model_.head_dim * s_;
  const std::int64_t keys = flow.all * key_value_heads_ * (model_.head_dim + model_.values()) * s_;
  const Held delta = work(flow.all * heads_ * s_);
  Held gradients = work(queries + keys);
  const Held packed = work(keys);
  Held wide;
  if (b_ < s_) wide = work(queries + flow.all * heads_ * model_.values() * s_ + keys);
  return gradients;
}

Held LayerMemory::attention(MemoryFlow& flow) {
  if (model_.kv_lora_rank > 0) return latent_attention(flow);
  const Held qkv = column(flow, (heads_ + 2 * key_value_heads_) * model_.head_dim);
  Stream attended;
  {
    Held normed;
    if (model_.qk_norm) {
      normed = work(flow.all * (heads_ + key_value_heads_) * model_.head_dim * b_);
    }
    attended = attend(flow);
  }
  save(flow, MemoryPart::kAttention, qkv);
  save(flow, MemoryPart::kAttention, attended.stream);
  save(flow, MemoryPart::kAttention, attended.pending);
  return row(flow, heads_ * model_.values());
}

Held LayerMemory::attention_backward(MemoryFlow& flow, const Held& dy, const Held& x) {
  if (model_.kv_lora_rank > 0) return latent_attention_backward(flow, dy, x);
  Held lse = restore(flow);
  Held out = restore(flow);
  const Held qkv = restore(flow);
  Held dout;
  {
    const Held all = gather(flow);
    dout = work(flow.all * heads_ * model_.values() * b_);
    product(model_.hidden, heads_ * model_.values());
    gradient(flow, all ? all : dy, out, flow.all, heads_ * model_.values());
  }
  Held gradients;
  {
    Held normed;
    if (model_.qk_norm) {
      normed = work(flow.all * (heads_ + key_value_heads_) * model_.head_dim * b_);
    }
    gradients = attend_backward(flow);
  }
  dout.reset();
  out.reset();
  lse.reset();
  const Held dqkv = work(flow.all * (heads_ + 2 * key_value_heads_) * model_.head_dim * b_);
  gradients.reset();
  return column_backward(flow, (heads_ + 2 * key_value_heads_) * model_.head_dim, dqkv, x);
}

Held LayerMemory::latent_attention(MemoryFlow& flow) {
  const std::int64_t width = model_.q_lora_rank + model_.kv_lora_rank + model_.rotated();
  const std::int64_t expanded = model_.head_dim - model_.rotated() + model_.values();
  const bool q_latent = model_.q_lora_rank > 0;
  const Held latents = work(flow.all * width * b_);
  Stream attended;
  {
    const Held normed = work(flow.all * (model_.q_lora_rank + model_.kv_lora_rank) * b_);
    const Held queries = work(flow.all * heads_ * model_.head_dim * b_);
    const Held both = work(flow.all * heads_ * expanded * b_);
    const Held keys = work(flow.all * heads_ * model_.head_dim * b_);
    attended = attend(flow);
    if (!q_latent) save(flow, MemoryPart::kAttention, queries);
  }
  save(flow, MemoryPart::kAttention, latents);
  save(flow, MemoryPart::kAttention, attended.stream);
  save(flow, MemoryPart::kAttention, attended.pending);
  return row(flow, heads_ * model_.values());
}

Held LayerMemory::latent_attention_backward(MemoryFlow& flow, const Held& dy, const Held& x) {
  const std::int64_t width = model_.q_lora_rank + model_.kv_lora_rank + model_.rotated();
  const std::int64_t expanded = model_.head_dim - model_.rotated() + model_.values();
  const bool q_latent = model_.q_lora_rank > 0;
  Held lse = restore(flow);
  Held out = restore(flow);
  const Held latents = restore(flow);
  const Held queries = q_latent ? work(flow.all * heads_ * model_.head_dim * b_) : restore(flow);
  const Held normed = work(flow.all * (model_.q_lora_rank + model_.kv_lora_rank) * b_);
  const Held both = work(flow.all * heads_ * expanded * b_);
  const Held keys = work(flow.all * heads_ * model_.head_dim * b_);
  Held dout = work(flow.all * heads_ * model_.values() * b_);
  gradient(flow, dy, out, flow.all, heads_ * model_.values());
  Held gradients = attend_backward(flow);
  dout.reset();
  out.reset();
  lse.reset();
  const Held dlatents = work(flow.all * width * b_);
  {
    const Held dboth = work(flow.all * heads_ * expanded * b_);
    const Held dnormed = work(flow.all * model_.kv_lora_rank * b_);
    gradient(flow, dboth, normed, flow.all, model_.kv_lora_rank);
  }
  Held dx;
  {
    const Held dqueries = work(flow.all * heads_ * model_.head_dim * b_);
    dx = work(flow.all * (q_latent ? model_.q_lora_rank : model_.hidden) * b_);
    gradient(flow, dqueries, q_latent ? normed : x, flow.all,
             q_latent ? model_.q_lora_rank : model_.hidden);
  }
  gradients.reset();
  gradient(flow, dlatents, x, flow.all, model_.hidden);
  return q_latent ? stream_rows(flow, MemoryPart::kWorkspace) : dx;
}

}  // namespace meshloom::plan::detail
