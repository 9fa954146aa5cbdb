#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace meshloom::model::detail {

inline constexpr const char* kConfigWhere = "model.config";

/// What differs between the families: transformers' own defaults for keys that a config.json may
/// leave out, and which parts the modelling code has.
struct Family {
  std::string_view name;
  std::string_view architecture;
  double eps;
  double theta;
  std::int64_t default_kv_heads;  ///< 0: as many as heads
  std::int64_t default_head_dim;  ///< 0: hidden_size / heads
  bool attention_bias_key;
  bool use_window_key;   ///< use_sliding_window switches sliding_window on
  bool layer_types_key;  ///< windows differ by layer
  bool moe;
  std::int64_t default_window;  ///< 0: none
  bool window_key;              ///< sliding_window means something
  bool latent_attention;        ///< and experts in groups with shared ones
};

/// @throws NotSupported  not one of ours; lists those that are.
const Family& find_family(const std::string& name);

[[noreturn]] void refuse(const std::string& what);

}  // namespace meshloom::model::detail
