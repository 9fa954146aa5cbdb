#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "meshloom/core/export.h"

namespace meshloom::model {

namespace detail {
class AtomicFile;
}

/// One tensor of a safetensors file.
struct TensorInfo {
  std::string name;
  at::ScalarType dtype = at::kFloat;
  std::vector<std::int64_t> shape;
  std::int64_t begin = 0;  ///< bytes from the start of the data section
  std::int64_t end = 0;
};

/// A safetensors file, mapped for reading. Everything in the header is checked before any tensor is
/// handed out, so a hostile file ends in an error: sizes against the file, shapes against sizes
/// (with overflow), tensors end to end without gap or overlap, no name twice. Immutable, so safe to
/// share between threads; tensors keep the mapping alive.
class MESHLOOM_API SafetensorsFile {
 public:
  /// @throws IoError       the file cannot be opened or mapped.
  /// @throws DataError     not a well-formed safetensors file; names the file and the tensor.
  /// @throws NotSupported  a dtype that ATen lacks.
  explicit SafetensorsFile(const std::string& path);

  [[nodiscard]] const std::string& path() const { return path_; }
  /// In data order.
  [[nodiscard]] const std::vector<TensorInfo>& tensors() const { return tensors_; }
  [[nodiscard]] const std::map<std::string, std::string>& metadata() const { return metadata_; }
  /// The tensor's description, or null.
  [[nodiscard]] const TensorInfo* find_if(const std::string& name) const;
  /// The tensor on the CPU: a view of the mapping where its data are aligned, else a copy. Writing
  /// to it does not reach the file.
  /// @throws InvalidArgument  unknown name.
  [[nodiscard]] at::Tensor tensor(const std::string& name) const;

 private:
  struct Mapping;
  void read_header();

  std::string path_;
  std::shared_ptr<Mapping> mapping_;
  std::int64_t data_begin_ = 0;
  std::vector<TensorInfo> tensors_;
  std::unordered_map<std::string, std::size_t> index_;
  std::map<std::string, std::string> metadata_;
};

/// Writes a safetensors file tensor by tensor, so that no more than one of them has to be in memory
/// in the form it is stored in. The file appears under its name only once complete: data go to a
/// temporary name beside it, are flushed to the disk and renamed. Destroyed before `commit`, it
/// leaves nothing behind and an older file untouched.
class MESHLOOM_API SafetensorsWriter {
 public:
  /// @param entries  name, dtype and shape of every tensor, in the order in which they are written
  ///   (begin and end are ignored). Where dtypes differ, wide ones first keeps all aligned.
  /// @throws IoError          the file cannot be created or written.
  /// @throws InvalidArgument  a name twice.
  SafetensorsWriter(const std::string& path, std::vector<TensorInfo> entries,
                    const std::map<std::string, std::string>& metadata);
  SafetensorsWriter(const SafetensorsWriter&) = delete;
  SafetensorsWriter& operator=(const SafetensorsWriter&) = delete;
  ~SafetensorsWriter();

  /// The next entry; converted to its dtype, moved to the CPU.
  /// @throws InvalidArgument  its shape is not the entry's, or all were written.
  /// @throws IoError          e.g. the disk is full.
  void write(const at::Tensor& tensor);
  /// Flushes to the disk, still under the temporary name: after it only the rename can fail.
  /// @throws InvalidArgument  entries are left to be written.
  /// @throws IoError          as write.
  void finish();
  /// `finish`, then the rename.
  void commit();

 private:
  std::unique_ptr<detail::AtomicFile> file_;
  std::vector<TensorInfo> entries_;
  std::size_t next_ = 0;
};

using NamedTensors = std::vector<std::pair<std::string, at::Tensor>>;

/// All tensors of a file, in data order, sharing its mapping. @throws as SafetensorsFile.
[[nodiscard]] MESHLOOM_API NamedTensors load_safetensors(const std::string& path);
/// @throws as SafetensorsWriter.
MESHLOOM_API void save_safetensors(const std::string& path, const NamedTensors& tensors,
                                   const std::map<std::string, std::string>& metadata = {});

/// Writes a small file under a temporary name, flushes it and renames it. @throws IoError.
MESHLOOM_API void write_file_atomically(const std::string& path, const std::string& text);

/// The safetensors files of a checkpoint folder: model.safetensors, or the shards that
/// model.safetensors.index.json lists.
class MESHLOOM_API SafetensorsFolder {
 public:
  /// @throws IoError    neither is there, or a file cannot be read.
  /// @throws DataError  malformed files; an index that does not fit its shards.
  explicit SafetensorsFolder(const std::string& folder);

  /// Every tensor and the file that holds it, file by file.
  struct Entry {
    const SafetensorsFile* file;
    const TensorInfo* info;
  };
  [[nodiscard]] const std::vector<Entry>& entries() const { return entries_; }

 private:
  std::vector<std::unique_ptr<SafetensorsFile>> files_;
  std::vector<Entry> entries_;
};

}  // namespace meshloom::model
