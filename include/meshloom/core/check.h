#pragma once

#include <sstream>
#include <string>

#include "meshloom/core/error.h"

namespace meshloom::detail {

template <class A, class B>
std::string both_sides(const char* what, const A& given, const char* relation, const B& expected) {
  std::ostringstream text;
  text << what << ": got " << given << ", expected " << relation << ' ' << expected;
  return text.str();
}

}  // namespace meshloom::detail

/// Checks of what a caller handed in; always on. `where` names the public call, e.g. "comm.split".
#define MESHLOOM_CHECK(condition, where, message)                        \
  do {                                                                   \
    if (!(condition)) throw ::meshloom::InvalidArgument(where, message); \
  } while (false)

#define MESHLOOM_CHECK_RELATION_(a, op, b, where, what)                                \
  do {                                                                                 \
    const auto& meshloom_a_ = (a);                                                     \
    const auto& meshloom_b_ = (b);                                                     \
    if (!(meshloom_a_ op meshloom_b_))                                                 \
      throw ::meshloom::InvalidArgument(                                               \
          where, ::meshloom::detail::both_sides(what, meshloom_a_, #op, meshloom_b_)); \
  } while (false)

/// Comparison checks print both sides.
#define MESHLOOM_CHECK_EQ(a, b, where, what) MESHLOOM_CHECK_RELATION_(a, ==, b, where, what)
#define MESHLOOM_CHECK_GE(a, b, where, what) MESHLOOM_CHECK_RELATION_(a, >=, b, where, what)
#define MESHLOOM_CHECK_GT(a, b, where, what) MESHLOOM_CHECK_RELATION_(a, >, b, where, what)
#define MESHLOOM_CHECK_LE(a, b, where, what) MESHLOOM_CHECK_RELATION_(a, <=, b, where, what)
#define MESHLOOM_CHECK_LT(a, b, where, what) MESHLOOM_CHECK_RELATION_(a, <, b, where, what)
