#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "meshloom/plan/schedule.h"
#include "meshloom/plan/verifier.h"

namespace meshloom::plan::detail {

/// `rank 3, instruction 5 (backward, slot 2, unit 0, samples 4, 9)`.
[[nodiscard]] std::string describe(const StepPlan& plan, const Program& program, std::size_t index);

/// All ranks' programs as one graph: transfers matched pairwise in order, rendezvous matched as the
/// n-th meeting of a group, and from both who waits for whom under unbuffered semantics.
/// Neighbouring sends and receives of a rank are posted together and complete together.
class ProgramGraph {
 public:
  ProgramGraph(const StepPlan& plan, const std::vector<Program>& programs,
               std::vector<Violation>& violations);

  void match_transfers();
  void match_rendezvous();
  /// Needs both matchings to have succeeded.
  void check_acyclic();

  /// The model's pieces as the matched activations connect them: (stage, chunk) -> next.
  using Links = std::map<std::pair<int, int>, std::pair<int, int>>;
  [[nodiscard]] const Links& links() const { return links_; }

 private:
  struct Place {
    int rank = 0;
    std::uint32_t index = 0;       // instruction
    std::uint32_t rendezvous = 0;  // in the instruction
  };
  struct Meeting {
    RendezvousKind kind = RendezvousKind::kExchange;
    RankList ranks;
    std::vector<Place> places;  // by rank, then in program order
  };

  const Instruction& at(const Place& place) const {
    return programs_[static_cast<std::size_t>(place.rank)].instructions[place.index];
  }
  const Rendezvous& rendezvous_at(const Place& place) const {
    return at(place).rendezvous[place.rendezvous];
  }
  std::string name(const Place& place) const {
    return describe(plan_, programs_[static_cast<std::size_t>(place.rank)], place.index);
  }
  void report(const char* contract, std::string message) {
    violations_.push_back({contract, std::move(message)});
  }
  bool peer_is_sound(const Place& place);
  void match_pair(const std::vector<Place>& sends, const std::vector<Place>& receives);
  void link(const Place& send, const Place& receive);
  Meeting* meeting_of(const Place& place);
  bool ranks_are_sound(const Place& place);
  void match_meeting(const Meeting& meeting);
  void report_cycle(const std::vector<bool>& done);
  [[nodiscard]] std::size_t start_of(const Place& place) const;

  const StepPlan& plan_;
  const std::vector<Program>& programs_;
  std::vector<Violation>& violations_;
  Links links_;
  std::vector<std::pair<Place, Place>> transfers_;
  std::vector<Meeting> meetings_;
  std::unordered_map<const void*, std::size_t> list_of_address_;
  std::unordered_map<std::uint64_t, std::vector<std::size_t>> lists_by_hash_;
  std::vector<RankList> lists_;
  std::vector<bool> list_is_sound_;
  std::map<std::pair<int, std::size_t>, std::size_t> meeting_of_;
  std::vector<std::vector<Place>> joint_;  // one meeting each: who takes part
  std::vector<std::size_t> base_;          // first node of each rank
  std::vector<std::pair<std::uint32_t, std::uint32_t>> edges_;
};

}  // namespace meshloom::plan::detail
