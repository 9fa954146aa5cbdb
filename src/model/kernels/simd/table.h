#pragma once

#include "model/kernels/simd/attention.h"
#include "model/kernels/simd/gemm.h"
#include "model/kernels/simd/heads.h"
#include "model/kernels/simd/routing.h"
#include "model/kernels/simd/rows.h"

// Defines the two tables of this level; included once by every level's source.
namespace meshloom::model::kernels::MESHLOOM_SIMD_LEVEL {

template <class T>
constexpr KernelTable<T> make_table() {
  KernelTable<T> table{};
  table.panel = kTileVectors * kLanes<T>;
  table.pack_b = pack_b<T>;
  table.product = product<T>;
  table.product_scratch = kPackedTiles * kTileRows;
  table.lanes = kLanes<T>;
  table.query_rows = kQueryRows;
  table.attention_forward = attention_forward<T>;
  table.attention_backward = attention_backward<T>;
  table.attention_scratch = attention_scratch<T>;
  table.attention_delta = attention_delta<T>;
  table.norm = norm<T>;
  table.norm_backward = norm_backward<T>;
  table.heads = heads<T>;
  table.heads_backward = heads_backward<T>;
  table.swiglu = swiglu<T>;
  table.swiglu_backward = swiglu_backward<T>;
  table.route = route<T>;
  table.route_backward = route_backward<T>;
  table.combine = combine<T>;
  table.cross_entropy = cross_entropy<T>;
  table.add = add<T>;
  return table;
}

const KernelTable<float> kTable32 = make_table<float>();
const KernelTable<double> kTable64 = make_table<double>();

}  // namespace meshloom::model::kernels::MESHLOOM_SIMD_LEVEL
