#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdio>
#include <string>
#include <system_error>
#include <utility>

#include "meshloom/core/error.h"
#include "meshloom/plan/step_plan.h"

namespace meshloom::plan {
namespace {

constexpr int kMostAttempts = 100;  ///< at a free temporary name

[[noreturn]] void fail(const char* where, const std::string& path, const char* doing, int code) {
  throw IoError(
      where, fmt::format("{}: {} failed: {}", path, doing, std::generic_category().message(code)));
}

/// An open file that closes itself.
class File {
 public:
  explicit File(int descriptor) : descriptor_(descriptor) {}
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  ~File() {
    if (descriptor_ >= 0) ::close(descriptor_);
  }
  [[nodiscard]] int get() const { return descriptor_; }
  int release_and_close() { return ::close(std::exchange(descriptor_, -1)); }

 private:
  int descriptor_;
};

}  // namespace

void StepPlan::save(const std::string& path) const {
  constexpr const char* kWhere = "plan.save";
  const std::string text = to_json();
  std::string temporary;
  int descriptor = -1;
  for (int attempt = 0; descriptor < 0 && attempt < kMostAttempts; ++attempt) {
    temporary = fmt::format("{}.{}.{}.tmp", path, ::getpid(), attempt);
    descriptor = ::open(temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (descriptor < 0 && errno != EEXIST) break;
  }
  File file(descriptor);
  if (file.get() < 0) fail(kWhere, path, "creating a temporary file beside it", errno);
  const auto give_up = [&](const char* doing) {
    const int code = errno;
    ::unlink(temporary.c_str());
    fail(kWhere, path, doing, code);
  };
  for (std::size_t written = 0; written < text.size();) {
    const ssize_t count = ::write(file.get(), text.data() + written, text.size() - written);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) give_up("writing");
    written += static_cast<std::size_t>(count);
  }
  if (::fsync(file.get()) != 0) give_up("flushing");
  if (file.release_and_close() != 0) give_up("closing");
  if (std::rename(temporary.c_str(), path.c_str()) != 0) give_up("renaming");
}

StepPlan StepPlan::load(const std::string& path) {
  constexpr const char* kWhere = "plan.load";
  const File file(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (file.get() < 0) fail(kWhere, path, "opening", errno);
  std::string text;
  std::array<char, 1 << 16> block;
  while (true) {
    const ssize_t count = ::read(file.get(), block.data(), block.size());
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) fail(kWhere, path, "reading", errno);
    if (count == 0) break;
    text.append(block.data(), static_cast<std::size_t>(count));
  }
  try {
    return from_json(text);
  } catch (const PlanError& error) {
    throw PlanError(kWhere, fmt::format("{}: {}", path, error.what()));
  }
}

}  // namespace meshloom::plan
