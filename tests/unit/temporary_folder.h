#pragma once

#include <stdlib.h>

#include <filesystem>
#include <string>

namespace meshloom {

/// A fresh folder that is removed with the object.
class TemporaryFolder {
 public:
  TemporaryFolder() {
    std::string name = (std::filesystem::temp_directory_path() / "meshloom-XXXXXX").string();
    path_ = ::mkdtemp(name.data());
  }
  ~TemporaryFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;
  [[nodiscard]] const std::string& path() const { return path_; }
  [[nodiscard]] std::string file(const std::string& name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

/// The message of the error that `body` throws; empty where it throws none.
template <class Failure, class Body>
std::string message_of(const Body& body) {
  try {
    body();
  } catch (const Failure& error) {
    return error.what();
  }
  return {};
}

}  // namespace meshloom
