#include <pybind11/chrono.h>
#include <pybind11/functional.h>
#include <pybind11/operators.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "bindings/core/bindings.h"
#include "bindings/core/support.h"
#include "meshloom/data/loader.h"
#include "meshloom/data/sources.h"
#include "meshloom/data/token_cache.h"
#include "meshloom/data/tokenizer.h"

namespace meshloom::bindings {
namespace {

namespace py = pybind11;
using data::Document;
using data::Source;
using data::Tokenizer;
using Unlocked = py::call_guard<py::gil_scoped_release>;

std::vector<std::int32_t> tokens_of(const py::handle& value) {
  try {
    return value.cast<std::vector<std::int32_t>>();
  } catch (const py::cast_error&) {
    std::string shown = py::repr(value).cast<std::string>();
    constexpr std::size_t kShown = 60;
    if (shown.size() > kShown) shown = shown.substr(0, kShown) + "...";
    throw DataError("data.document", "the tokens " + shown + " are no sequence of integers");
  }
}

/// A Document, or a mapping {tokens, loss_mask}, or a sequence of tokens.
Document document_of(const py::handle& value) {
  if (py::isinstance<Document>(value)) return value.cast<Document>();
  Document document;
  if (py::isinstance<py::dict>(value)) {
    const auto fields = py::reinterpret_borrow<py::dict>(value);
    if (!fields.contains("tokens")) {
      throw DataError("data.document", "the mapping has no key \"tokens\"");
    }
    document.tokens = tokens_of(fields["tokens"]);
    if (fields.contains("loss_mask") && !fields["loss_mask"].is_none()) {
      for (const py::handle flag : fields["loss_mask"]) {
        document.loss_mask.push_back(flag.cast<bool>() ? 1 : 0);
      }
    }
    return document;
  }
  document.tokens = tokens_of(value);
  return document;
}

std::shared_ptr<Source> source_of_iterable(const py::iterable& values, const std::string& name,
                                           std::int64_t max_tokens) {
  py::iterator position = py::iter(values);
  return data::iterator_source(
      name,
      [&position]() -> std::optional<Document> {
        if (position == py::iterator::sentinel()) return std::nullopt;
        Document document = document_of(*position);
        ++position;
        return document;
      },
      max_tokens);
}

std::shared_ptr<Source> source_of_sequence(const py::object& values, const std::string& name) {
  const auto held = std::shared_ptr<py::object>(new py::object(values), [](py::object* object) {
    const py::gil_scoped_acquire acquire;
    delete object;
  });
  return data::callback_source(name, static_cast<std::int64_t>(py::len(values)),
                               [held](std::int64_t index) {
                                 const py::gil_scoped_acquire acquire;
                                 return document_of((*held)[py::int_(index)]);
                               });
}

data::TextFolderOptions text_options(bool add_bos, bool add_eos, const std::string& invalid_utf8,
                                     std::vector<std::string> extensions) {
  if (invalid_utf8 != "error" && invalid_utf8 != "skip") {
    throw InvalidArgument(
        "data.text", "invalid_utf8 is \"" + invalid_utf8 + "\", expected \"error\" or \"skip\"");
  }
  data::TextFolderOptions options;
  options.add_bos = add_bos;
  options.add_eos = add_eos;
  options.invalid_utf8 =
      invalid_utf8 == "skip" ? data::InvalidText::kSkip : data::InvalidText::kError;
  options.extensions = std::move(extensions);
  return options;
}

void bind_tokenizers(py::module_& module) {
  py::class_<Tokenizer, std::shared_ptr<Tokenizer>>(module, "Tokenizer",
                                                    "Text to token ids and back.")
      .def(
          "encode",
          [](const Tokenizer& self, const std::string& text) { return self.encode(text); },
          py::arg("text"), Unlocked())
      .def("decode", &Tokenizer::decode, py::arg("tokens"), Unlocked())
      .def_property_readonly("vocab_size", &Tokenizer::vocab_size)
      .def_property_readonly("bos", &Tokenizer::bos, "-1: none")
      .def_property_readonly("eos", &Tokenizer::eos, "-1: none")
      .def_property_readonly("fingerprint", &Tokenizer::fingerprint);
  module.def("load_sentencepiece", &data::load_sentencepiece, py::arg("path"), Unlocked(),
             "A SentencePiece model file.");
  module.def(
      "callback_tokenizer",
      [](std::function<std::vector<std::int32_t>(std::string)> encode,
         std::function<std::string(std::vector<std::int32_t>)> decode, std::int64_t vocab_size,
         std::int32_t bos, std::int32_t eos, const std::string& fingerprint) {
        data::CallbackTokenizer callbacks;
        callbacks.encode = [encode = std::move(encode)](std::string_view text) {
          return encode(std::string(text));
        };
        if (decode) callbacks.decode = std::move(decode);
        callbacks.vocab_size = vocab_size;
        callbacks.bos = bos;
        callbacks.eos = eos;
        callbacks.fingerprint = fingerprint;
        return data::callback_tokenizer(std::move(callbacks));
      },
      py::arg("encode"), py::arg("decode"), py::kw_only(), py::arg("vocab_size"),
      py::arg("bos") = -1, py::arg("eos") = -1, py::arg("fingerprint"),
      "A tokenizer behind Python functions; they are called from any thread.");
  module.def(
      "train_sentencepiece",
      [](const std::vector<std::string>& files, const std::string& model_path,
         std::int64_t vocab_size, std::int64_t max_bytes, std::uint64_t seed) {
        data::train_sentencepiece(files, model_path,
                                  {.vocab_size = vocab_size, .max_bytes = max_bytes, .seed = seed});
      },
      py::arg("files"), py::arg("model_path"), py::kw_only(), py::arg("vocab_size") = 8192,
      py::arg("max_bytes") = 15'000'000, py::arg("seed") = 0, Unlocked(),
      "Trains a byte-fallback BPE on text files and writes it; lossless and deterministic.");
}

void bind_sources(py::module_& module) {
  py::class_<Document>(module, "Document", "Tokens, and which of them are targets.")
      .def(py::init([](std::vector<std::int32_t> tokens, std::vector<bool> loss_mask) {
             Document document{std::move(tokens), {loss_mask.begin(), loss_mask.end()}};
             return document;
           }),
           py::arg("tokens"), py::arg("loss_mask") = std::vector<bool>())
      .def_readonly("tokens", &Document::tokens)
      .def_readonly("loss_mask", &Document::loss_mask)
      .def_property_readonly("loss_tokens", &Document::loss_tokens)
      .def("__len__", [](const Document& self) { return self.tokens.size(); })
      .def(py::self == py::self);
  py::class_<Source, std::shared_ptr<Source>>(module, "Source", "Documents by index.")
      .def("__len__", &Source::size)
      .def("__getitem__", &Source::load, py::arg("index"), Unlocked())
      .def_property_readonly("name", &Source::name)
      .def("describe", &Source::describe, py::arg("index"))
      .def_property_readonly("fingerprint", &Source::fingerprint);
  module.def("documents_of_iterable", &source_of_iterable, py::arg("values"),
             py::arg("name") = "documents", py::arg("max_tokens") = 1'000'000'000);
  module.def("documents_of_sequence", &source_of_sequence, py::arg("values"),
             py::arg("name") = "documents");
  module.def(
      "text_folder",
      [](const std::vector<std::string>& paths, std::shared_ptr<Tokenizer> tokenizer,
         const std::vector<std::string>& extensions, bool add_bos, bool add_eos,
         const std::string& invalid_utf8) {
        return data::text_folder(paths, std::move(tokenizer),
                                 text_options(add_bos, add_eos, invalid_utf8, extensions));
      },
      py::arg("paths"), py::arg("tokenizer"), py::kw_only(),
      py::arg("extensions") = std::vector<std::string>(), py::arg("add_bos") = false,
      py::arg("add_eos") = true, py::arg("invalid_utf8") = "error", Unlocked());
  module.def(
      "jsonl",
      [](const std::vector<std::string>& paths, std::shared_ptr<Tokenizer> tokenizer, bool add_bos,
         bool add_eos, const std::string& invalid_utf8) {
        return data::jsonl(paths, std::move(tokenizer),
                           text_options(add_bos, add_eos, invalid_utf8, {}));
      },
      py::arg("paths"), py::arg("tokenizer") = nullptr, py::kw_only(), py::arg("add_bos") = false,
      py::arg("add_eos") = true, py::arg("invalid_utf8") = "error", Unlocked());
  module.def("concatenate", &data::concatenate, py::arg("sources"), Unlocked(),
             "One source of several, each document equally likely.");
  module.def(
      "cached",
      [](std::shared_ptr<Source> source, const std::string& folder) {
        return data::cached(std::move(source), std::make_shared<data::TokenCache>(folder));
      },
      py::arg("source"), py::arg("folder"), Unlocked(),
      "The same documents, kept tokenised in a folder that processes share.");
}

void bind_loader(py::module_& module) {
  py::class_<data::DocumentRef>(module, "DocumentRef", "A document, or a piece of a long one.")
      .def_readonly("source", &data::DocumentRef::source)
      .def_readonly("document", &data::DocumentRef::document)
      .def_readonly("begin", &data::DocumentRef::begin)
      .def_readonly("end", &data::DocumentRef::end);
  py::class_<data::StepMembership>(module, "StepMembership", "What one step trains on.")
      .def_readonly("step", &data::StepMembership::step)
      .def_readonly("samples", &data::StepMembership::samples)
      .def_readonly("refs", &data::StepMembership::refs)
      .def_readonly("epoch", &data::StepMembership::epoch)
      .def_readonly("split_documents", &data::StepMembership::split_documents)
      .def_readonly("skipped_documents", &data::StepMembership::skipped_documents)
      .def_property_readonly("tokens", &data::StepMembership::tokens);
  py::class_<data::Loader, std::shared_ptr<data::Loader>>(
      module, "Loader", "Decides step membership: a pure function of options and sources.")
      .def(py::init([](const std::vector<std::pair<std::shared_ptr<Source>, double>>& sources,
                       std::int64_t global_batch_tokens, std::int64_t max_document_tokens,
                       std::uint64_t seed, double held_out_fraction, std::int64_t vocab_size,
                       std::int64_t prefetch_steps, std::chrono::milliseconds timeout) {
             std::vector<data::WeightedSource> weighted;
             for (const auto& [source, weight] : sources) weighted.push_back({source, weight});
             data::LoaderOptions options;
             options.global_batch_tokens = global_batch_tokens;
             options.max_document_tokens = max_document_tokens;
             options.seed = seed;
             options.held_out_fraction = held_out_fraction;
             options.vocab_size = vocab_size;
             options.prefetch_steps = prefetch_steps;
             options.timeout = timeout;
             return std::shared_ptr<data::Loader>(new data::Loader(std::move(weighted), options),
                                                  UnlockedDelete());
           }),
           py::arg("sources"), py::kw_only(), py::arg("global_batch_tokens"),
           py::arg("max_document_tokens") = 0, py::arg("seed") = 0,
           py::arg("held_out_fraction") = 0.0, py::arg("vocab_size") = 0,
           py::arg("prefetch_steps") = 2, py::arg("timeout") = std::chrono::milliseconds(600'000),
           "`sources` are pairs (source, weight); weights are shares of tokens.")
      .def("next", &data::Loader::next, Unlocked(),
           "Membership of the next step; blocks until its lengths are known.")
      .def("held_out", &data::Loader::held_out, py::arg("max_tokens"), Unlocked())
      .def("load", &data::Loader::load, py::arg("ref"), Unlocked())
      .def("describe", &data::Loader::describe, py::arg("ref"), Unlocked())
      .def("state", &data::Loader::state, Unlocked())
      .def("restore", &data::Loader::restore, py::arg("state"), Unlocked())
      .def_property_readonly("fingerprint", &data::Loader::fingerprint);
}

}  // namespace

void bind_data(py::module_& module) {
  bind_tokenizers(module);
  bind_sources(module);
  bind_loader(module);
}

}  // namespace meshloom::bindings
