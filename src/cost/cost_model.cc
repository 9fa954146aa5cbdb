#include "meshloom/cost/cost_model.h"

#include <fmt/format.h>

#include <array>
#include <cmath>
#include <string_view>
#include <utility>

#include "meshloom/core/check.h"

namespace meshloom {

void CostModel::validate() const {
  const std::array<std::pair<std::string_view, double>, 4> coefficients{
      {{"quadratic", quadratic}, {"linear", linear}, {"fixed", fixed}, {"exchange", exchange}}};
  for (const auto& [name, value] : coefficients) {
    MESHLOOM_CHECK(std::isfinite(value) && value >= 0, "cost.cost_model",
                   fmt::format("{} is {}, expected a finite number >= 0", name, value));
  }
  MESHLOOM_CHECK(quadratic > 0 || linear > 0, "cost.cost_model",
                 "quadratic and linear are both 0, expected one of them > 0");
}

}  // namespace meshloom
