#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <string_view>

namespace meshloom::model::detail {

inline constexpr const char* kSafetensorsWhere = "model.safetensors";

/// The reference implementation refuses longer headers too.
inline constexpr std::int64_t kMaxHeaderBytes = 100'000'000;

struct DtypeName {
  std::string_view name;
  at::ScalarType dtype;
  std::int64_t bytes;
};

inline constexpr std::array<DtypeName, 12> kDtypes{{{"F64", at::kDouble, 8},
                                                    {"F32", at::kFloat, 4},
                                                    {"F16", at::kHalf, 2},
                                                    {"BF16", at::kBFloat16, 2},
                                                    {"I64", at::kLong, 8},
                                                    {"I32", at::kInt, 4},
                                                    {"I16", at::kShort, 2},
                                                    {"I8", at::kChar, 1},
                                                    {"U8", at::kByte, 1},
                                                    {"BOOL", at::kBool, 1},
                                                    {"F8_E4M3", at::kFloat8_e4m3fn, 1},
                                                    {"F8_E5M2", at::kFloat8_e5m2, 1}}};

}  // namespace meshloom::model::detail
