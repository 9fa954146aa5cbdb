#pragma once

#include <cstddef>
#include <string>

namespace meshloom::model::detail {

/// The bytes of a small file. @throws IoError  it cannot be read, or is a folder.
std::string read_file(const std::string& path, const char* where);

/// A file that appears under its name only once complete: data go to a temporary name beside it,
/// `finish` flushes them to the disk and `commit` renames. Destroyed before `commit`, it leaves
/// nothing behind and an older file untouched. All throw IoError, naming `path`.
class AtomicFile {
 public:
  explicit AtomicFile(std::string path);
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;
  ~AtomicFile();

  void write(const void* data, std::size_t bytes);
  /// After it nothing but the rename can fail: a full disk has shown itself.
  void finish();
  void commit();

  [[nodiscard]] const std::string& path() const { return path_; }

 private:
  std::string path_;
  std::string temporary_;  ///< empty once renamed
  int file_ = -1;
};

}  // namespace meshloom::model::detail
