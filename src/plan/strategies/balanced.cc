#include "plan/balance/fill.h"
#include "plan/balance/model.h"
#include "plan/balance/search.h"
#include "plan/strategies/strategies.h"

namespace meshloom::plan {
namespace {

class Balanced final : public BalanceStrategy {
 public:
  [[nodiscard]] std::vector<Slot> assign(const PlanProblem& problem) const override {
    balance::Model model(problem);
    const balance::Schedule schedule = balance::search(model);
    return balance::to_slots(problem, model, schedule.pieces);
  }
};

}  // namespace

std::shared_ptr<BalanceStrategy> make_balanced() { return std::make_shared<Balanced>(); }

}  // namespace meshloom::plan
