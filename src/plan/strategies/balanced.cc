#include "plan/balance/fill.h"
#include "plan/balance/model.h"
#include "plan/balance/search.h"
#include "plan/strategies/strategies.h"

namespace meshloom::plan {
namespace {

class Balanced final : public BalanceStrategy {
 public:
  [[nodiscard]] std::vector<Slot> assign(const PlanProblem& problem) const override {
    const balance::Model model(problem);
    return balance::to_slots(problem, model, balance::search(model).pieces);
  }
};

}  // namespace

std::shared_ptr<BalanceStrategy> make_balanced() { return std::make_shared<Balanced>(); }

}  // namespace meshloom::plan
