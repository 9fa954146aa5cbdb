#include "meshloom/data/tokenizer.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/ones.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <sstream>
#include <string>

#include "meshloom/core/error.h"
#include "meshloom/core/random.h"
#include "temporary_folder.h"
#include "test_tokenizer.h"

namespace meshloom::data {
namespace {

using ::meshloom::data::testing::message_of;
using ::meshloom::data::testing::TemporaryFolder;
using ::testing::HasSubstr;

// A few thousand words of code-like text.
std::string sample_code(std::uint64_t seed) {
  static const char* const kWords[] = {"return", "self",   "tensor", "for",    "range",
                                       "shape",  "assert", "size",   "import", "value"};
  std::string text;
  for (std::uint64_t i = 0; i < 4000; ++i) {
    const std::uint64_t bits = random_bits(seed, i);
    text += kWords[bits % 10];
    if (bits >> 8 & 1) text += std::to_string(bits >> 50);
    text += (bits >> 9 & 7) == 0 ? ":\n\n        " : (bits >> 9 & 1) != 0 ? " " : "(\"\xC3\xA9\")";
  }
  return text;
}

class SentencePiece : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    folder_ = new TemporaryFolder();
    files_ = new std::vector<std::string>();
    for (const char* name : {"a.py", "b.py", "c.py", "d.py"}) {
      files_->push_back(folder_->write(name, sample_code(files_->size())));
    }
    train_sentencepiece(*files_, folder_->path("model"), small());
    tokenizer_ = new std::shared_ptr<Tokenizer>(load_sentencepiece(folder_->path("model")));
  }
  static void TearDownTestSuite() {
    delete tokenizer_;
    delete files_;
    delete folder_;
  }
  static TokenizerTraining small() {
    TokenizerTraining options;
    options.vocab_size = 400;
    return options;
  }
  static std::string content(const std::string& path) {
    std::ostringstream text;
    text << std::ifstream(path, std::ios::binary).rdbuf();
    return text.str();
  }

  static TemporaryFolder* folder_;
  static std::vector<std::string>* files_;
  static std::shared_ptr<Tokenizer>* tokenizer_;
};

TemporaryFolder* SentencePiece::folder_ = nullptr;
std::vector<std::string>* SentencePiece::files_ = nullptr;
std::shared_ptr<Tokenizer>* SentencePiece::tokenizer_ = nullptr;

TEST_F(SentencePiece, DecodeOfEncodeIsTheText) {
  const Tokenizer& tokenizer = **tokenizer_;
  for (const std::string_view text :
       {"", " ", "  two  spaces  ", "\n\n\n", "\ttab\t", "a\r\nb", "return self.shape[0]  \n",
        "\xE2\x96\x81 the space symbol itself \xE2\x96\x81\xE2\x96\x81", "<unk> <s> </s> <0x0A>",
        "\xF0\x9F\x98\x80 \xE4\xB8\xAD\xE6\x96\x87 \xC3\xA9 e\xCC\x81 \xEF\xBC\xA1 \xE2\x81\x87",
        "12345 3.14"}) {
    EXPECT_EQ(tokenizer.decode(tokenizer.encode(text)), text);
  }
  const std::string_view zero("a\0b", 3);
  EXPECT_EQ(tokenizer.decode(tokenizer.encode(zero)), zero);
  EXPECT_EQ(tokenizer.decode(tokenizer.encode(sample_code(99))), sample_code(99));
}

TEST_F(SentencePiece, DecodeOfEncodeIsTheTextForRandomCharacters) {
  const Tokenizer& tokenizer = **tokenizer_;
  for (std::uint64_t trial = 0; trial < 300; ++trial) {
    std::string text;
    for (std::uint64_t i = 0; i < trial % 40; ++i) {
      const std::uint64_t bits = random_bits(trial, i);
      const auto put = [&text](std::uint64_t byte) { text += static_cast<char>(byte); };
      if (bits & 1) {
        put(bits >> 8 & 0x7F);
      } else {  // U+0800 .. U+CFFF
        const std::uint64_t point = 0x800 + (bits >> 8) % 0xC800;
        put(0xE0 | point >> 12);
        put(0x80 | (point >> 6 & 0x3F));
        put(0x80 | (point & 0x3F));
      }
    }
    ASSERT_EQ(tokenizer.decode(tokenizer.encode(text)), text) << "trial " << trial;
  }
}

TEST_F(SentencePiece, LearnsWordsAndSplitsDigits) {
  const Tokenizer& tokenizer = **tokenizer_;
  EXPECT_LE(tokenizer.vocab_size(), 400);
  EXPECT_LE(tokenizer.encode(" tensor").size(), 2U);
  EXPECT_GE(tokenizer.encode("2718").size(), 4U);
  EXPECT_EQ(tokenizer.eos(), 2);
  EXPECT_EQ(tokenizer.bos(), 1);
}

TEST_F(SentencePiece, TrainingIsRepeatable) {
  train_sentencepiece(*files_, folder_->path("again"), small());
  EXPECT_EQ(content(folder_->path("again")), content(folder_->path("model")));
  TokenizerTraining less = small();
  less.max_bytes = 30'000;
  train_sentencepiece(*files_, folder_->path("seed0"), less);
  less.seed = 1;
  train_sentencepiece(*files_, folder_->path("seed1"), less);
  EXPECT_NE(content(folder_->path("seed0")), content(folder_->path("seed1")));
  EXPECT_NE(load_sentencepiece(folder_->path("seed0"))->fingerprint(),
            (*tokenizer_)->fingerprint());
}

// Both carry a protobuf of their own; a clash of symbols would end the process.
TEST_F(SentencePiece, LivesBesideLibTorch) {
  const at::Tensor product = at::ones({8, 8}).matmul(at::ones({8, 8}));
  EXPECT_EQ(product.sum().item<float>(), 512.0F);
  train_sentencepiece(*files_, folder_->path("beside"), small());
  EXPECT_EQ(content(folder_->path("beside")), content(folder_->path("model")));
  EXPECT_EQ(load_sentencepiece(folder_->path("beside"))->fingerprint(),
            (*tokenizer_)->fingerprint());
}

TEST_F(SentencePiece, SmallCorpusGivesASmallerVocabulary) {
  const std::string file = folder_->write("tiny.txt", "one two\n");
  train_sentencepiece({file}, folder_->path("tiny"), {});
  const auto tokenizer = load_sentencepiece(folder_->path("tiny"));
  EXPECT_LT(tokenizer->vocab_size(), 300);
  EXPECT_EQ(tokenizer->decode(tokenizer->encode("anything else")), "anything else");
}

TEST_F(SentencePiece, TrainsOnTheTextFieldOfJsonl) {
  const std::string file =
      folder_->write("x.jsonl", "{\"text\": \"zebra zebra zebra\"}\n{\"tokens\": [1]}\nnot json\n");
  train_sentencepiece({file}, folder_->path("jsonl"), {});
  const auto tokenizer = load_sentencepiece(folder_->path("jsonl"));
  EXPECT_LE(tokenizer->encode(" zebra").size(), 2U);
  EXPECT_GE(tokenizer->encode(" tokens").size(), 6U);
}

TEST_F(SentencePiece, NothingToTrainOnIsRefusedAndWritesNothing) {
  const std::string bad = folder_->write("bad.txt", "\xFF\xFE");
  EXPECT_THAT(message_of<DataError>([&] { train_sentencepiece({bad}, folder_->path("none"), {}); }),
              HasSubstr("no UTF-8 text in 1 files"));
  EXPECT_FALSE(std::filesystem::exists(folder_->path("none")));
  TokenizerTraining tiny;
  tiny.vocab_size = 100;
  EXPECT_THROW(train_sentencepiece(*files_, folder_->path("none"), tiny), InvalidArgument);
  EXPECT_THAT(
      message_of<IoError>([&] { train_sentencepiece(*files_, folder_->path("no/such"), small()); }),
      HasSubstr("no/such"));
}

TEST_F(SentencePiece, DamagedModelIsRefusedByName) {
  const std::string path = folder_->write("damaged", "this is no model");
  EXPECT_THAT(message_of<DataError>([&] { (void)load_sentencepiece(path); }), HasSubstr(path));
  const std::string empty = folder_->write("empty", "");
  EXPECT_THROW((void)load_sentencepiece(empty), DataError);
  EXPECT_THROW((void)load_sentencepiece(folder_->path("absent")), IoError);
}

TEST_F(SentencePiece, IdOutsideTheVocabularyIsRefused) {
  EXPECT_THAT(message_of<DataError>([] {
                (void)(*tokenizer_)->decode({3, 100'000});
              }),
              HasSubstr("token 1 is 100000"));
}

TEST(CallbackTokenizer, ChecksWhatTheFunctionReturns) {
  CallbackTokenizer callbacks;
  callbacks.encode = [](std::string_view) { return std::vector<std::int32_t>{1, 9}; };
  callbacks.vocab_size = 9;
  callbacks.fingerprint = "x";
  const auto tokenizer = callback_tokenizer(callbacks);
  EXPECT_THAT(message_of<DataError>([&] { (void)tokenizer->encode("a"); }),
              HasSubstr("token 1 is 9, expected 0 .. 8"));
  EXPECT_THROW((void)tokenizer->decode({1}), NotSupported);
  callbacks.fingerprint.clear();
  EXPECT_THROW((void)callback_tokenizer(callbacks), InvalidArgument);
}

}  // namespace
}  // namespace meshloom::data
