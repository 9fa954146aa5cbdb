#include "meshloom/data/sources.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "meshloom/core/error.h"
#include "temporary_folder.h"
#include "test_tokenizer.h"

namespace meshloom::data {
namespace {

using ::meshloom::data::testing::byte_tokenizer;
using ::meshloom::data::testing::message_of;
using ::meshloom::data::testing::TemporaryFolder;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

std::vector<std::string> keys_of(const TextListing& listing) {
  std::vector<std::string> keys;
  for (const TextListing::File& file : listing.files) keys.push_back(file.key);
  return keys;
}

TEST(TextFolder, ListsRecursivelySortedAndCountsWhatItPassesOver) {
  const TemporaryFolder folder;
  folder.write("corpus/b.py", "b");
  folder.write("corpus/a/z.py", "z");
  folder.write("corpus/a.txt", "a");
  folder.write("corpus/.git/config.py", "hidden folder");
  folder.write("corpus/.hidden.py", "hidden file");
  folder.write("corpus/image.py", std::string("\x89PNG\0\0", 6));
  folder.write("corpus/empty.py", "");
  TextFolderOptions options;
  options.extensions = {".py"};
  const TextListing listing = list_text_files({folder.path("corpus/")}, options);
  EXPECT_THAT(keys_of(listing), ElementsAre("corpus/a/z.py", "corpus/b.py"));
  EXPECT_EQ(listing.hidden, 2);
  EXPECT_EQ(listing.binary, 1);
  EXPECT_EQ(listing.empty, 1);
  EXPECT_EQ(listing.other_extension, 1);
  EXPECT_EQ(listing.bytes, 2);
  EXPECT_THAT(keys_of(list_text_files({folder.path("corpus")})),
              ElementsAre("corpus/a.txt", "corpus/a/z.py", "corpus/b.py"));
}

TEST(TextFolder, FileNamedDirectlyIsTakenWhateverItsName) {
  const TemporaryFolder folder;
  TextFolderOptions options;
  options.extensions = {".py"};
  const auto listing = list_text_files({folder.write(".notes", "x")}, options);
  EXPECT_EQ(listing.files.size(), 1U);
}

TEST(TextFolder, EncodesAndEndsADocument) {
  const TemporaryFolder folder;
  const std::string path = folder.write("a.txt", "hi");
  const auto source = text_folder({path}, byte_tokenizer());
  EXPECT_THAT(source->load(0).tokens, ElementsAre('h', 'i', 257));
  EXPECT_EQ(source->describe(0), path);
  TextFolderOptions options;
  options.add_bos = true;
  options.add_eos = false;
  EXPECT_THAT(text_folder({path}, byte_tokenizer(), options)->load(0).tokens,
              ElementsAre(256, 'h', 'i'));
}

TEST(TextFolder, InvalidUtf8IsRefusedByFileAndByteOrSkipped) {
  const TemporaryFolder folder;
  const std::string path = folder.write("latin1.txt", "0123456789 caf\xE9 au lait");
  const auto source = text_folder({path}, byte_tokenizer());
  EXPECT_THAT(message_of<DataError>([&] { (void)source->load(0); }),
              HasSubstr(path + ": invalid UTF-8 at byte 14 (0xe9)"));
  TextFolderOptions options;
  options.invalid_utf8 = InvalidText::kSkip;
  EXPECT_TRUE(text_folder({path}, byte_tokenizer(), options)->load(0).tokens.empty());
}

TEST(TextFolder, RefusesWhatIsNotUtf8AtItsFirstBadByte) {
  const struct {
    std::string_view text;
    int bad;
  } cases[] = {{"\x80", 0},
               {"ab\xC0\xAF", 2},
               {"\xE0\x80\x80", 0},
               {"\xED\xA0\x80", 0},
               {"\xF4\x90\x80\x80", 0},
               {"x\xF0\x9F\x98", 1},
               {"\xE2\x82\xAC\xFF", 3}};
  for (const auto& [text, bad] : cases) {
    EXPECT_THAT(message_of<DataError>([&] { (void)byte_tokenizer()->encode(text); }),
                HasSubstr("invalid UTF-8 at byte " + std::to_string(bad) + " "));
  }
  for (const char* good : {"", "plain", "\xC2\x80", "\xED\x9F\xBF", "\xF4\x8F\xBF\xBF"}) {
    EXPECT_NO_THROW((void)byte_tokenizer()->encode(good));
  }
}

TEST(TextFolder, NothingFoundSaysWhereAndWhy) {
  const TemporaryFolder folder;
  folder.write("a.txt", "x");
  TextFolderOptions options;
  options.extensions = {".md"};
  EXPECT_THAT(message_of<DataError>([&] { (void)list_text_files({folder.path()}, options); }),
              ::testing::AllOf(HasSubstr(folder.path()), HasSubstr("1 of other extensions"),
                               HasSubstr("wanted .md")));
  EXPECT_THAT(message_of<IoError>([&] { (void)list_text_files({folder.path("absent")}); }),
              HasSubstr("absent"));
}

TEST(TextFolder, FileThatChangedIsRefused) {
  const TemporaryFolder folder;
  const std::string path = folder.write("a.txt", "one");
  const auto source = text_folder({path}, byte_tokenizer());
  folder.write("a.txt", "longer");
  EXPECT_THAT(message_of<DataError>([&] { (void)source->load(0); }),
              HasSubstr(path + " changed since it was listed"));
}

TEST(TextFolder, OversizedFileIsRefusedByName) {
  const TemporaryFolder folder;
  TextFolderOptions options;
  options.max_file_bytes = 3;
  const std::string path = folder.write("a.txt", "four");
  EXPECT_THAT(message_of<DataError>([&] { (void)list_text_files({path}, options); }),
              HasSubstr(path));
}

TEST(TextFolder, IdentityFollowsContentNotPlace) {
  const TemporaryFolder one;
  const TemporaryFolder two;
  for (const auto* folder : {&one, &two}) folder->write("corpus/a.txt", "same");
  two.write("corpus/b.txt", "more");
  const auto a = text_folder({one.path("corpus")}, byte_tokenizer());
  const auto b = text_folder({two.path("corpus")}, byte_tokenizer());
  EXPECT_EQ(a->order_key(0), b->order_key(0));
  EXPECT_NE(a->fingerprint(), b->fingerprint());
  EXPECT_EQ(a->fingerprint(), text_folder({two.path("corpus")}, byte_tokenizer(),
                                          [] {
                                            TextFolderOptions options;
                                            options.extensions = {"a.txt"};
                                            return options;
                                          }())
                                  ->fingerprint());
  EXPECT_NE(a->cache_key(0), b->cache_key(0));
  EXPECT_NE(a->fingerprint(),
            text_folder({one.path("corpus")}, byte_tokenizer("others"))->fingerprint());
}

TEST(Jsonl, ReadsTextAndTokens) {
  const TemporaryFolder folder;
  const std::string path = folder.write("x.jsonl",
                                        "{\"text\": \"hi\", \"id\": 3}\n"
                                        "\n  \r\n"
                                        "{\"tokens\": [5, 6, 7], \"loss_mask\": [0, 1, 1]}\r\n"
                                        "{\"tokens\": [1, 2], \"loss_mask\": [false, true]}");
  const auto source = jsonl({path}, byte_tokenizer());
  ASSERT_EQ(source->size(), 3);
  EXPECT_THAT(source->load(0).tokens, ElementsAre('h', 'i', 257));
  EXPECT_THAT(source->load(1).tokens, ElementsAre(5, 6, 7));
  EXPECT_THAT(source->load(1).loss_mask, ElementsAre(0, 1, 1));
  EXPECT_EQ(source->load(1).loss_tokens(), 2);
  EXPECT_THAT(source->load(2).loss_mask, ElementsAre(0, 1));
  EXPECT_EQ(source->describe(1), path + ":4");
}

TEST(Jsonl, ErrorsNameFileAndLine) {
  const struct {
    const char* line;
    const char* reason;
  } cases[] = {
      {"{\"text\": ", "malformed JSON at byte"},
      {"[1]", "a JSON array, expected an object"},
      {"{\"txt\": 1}", "neither \"text\" nor \"tokens\""},
      {"{\"text\": 1}", "\"text\" is a JSON number"},
      {"{\"tokens\": \"1\"}", "\"tokens\" is a JSON string"},
      {"{\"tokens\": [1, -2]}", "token 1 is -2"},
      {"{\"tokens\": [1.5]}", "token 0 is 1.5"},
      {"{\"tokens\": [4294967296]}", "token 0 is 4294967296"},
      {"{\"tokens\": [1, 2], \"loss_mask\": [1]}", "an array of 1, expected an array of 2"},
      {"{\"tokens\": [1], \"loss_mask\": [2]}", "loss_mask 0 is 2"},
      {"{\"text\": \"a\", \"loss_mask\": [1]}", "needs \"tokens\""},
      {"{\"text\": \"\xFF\"}", "invalid UTF-8 at byte 10"},
  };
  for (const auto& [line, reason] : cases) {
    const TemporaryFolder folder;
    const std::string path = folder.write("x.jsonl", std::string("{\"text\": \"a\"}\n") + line);
    const auto source = jsonl({path}, byte_tokenizer());
    EXPECT_NO_THROW((void)source->load(0));
    EXPECT_THAT(message_of<DataError>([&] { (void)source->load(1); }),
                ::testing::AllOf(HasSubstr(path + ":2: "), HasSubstr(reason)))
        << line;
  }
}

TEST(Jsonl, TextNeedsATokenizerTokensDoNot) {
  const TemporaryFolder folder;
  const std::string path = folder.write("x.jsonl", "{\"tokens\": [1]}\n{\"text\": \"a\"}\n");
  const auto source = jsonl({path}, nullptr);
  EXPECT_THAT(source->load(0).tokens, ElementsAre(1));
  EXPECT_THAT(message_of<DataError>([&] { (void)source->load(1); }),
              HasSubstr(path + ":2: it holds text, but no tokenizer was given"));
}

TEST(Jsonl, LinesAcrossReadBlocksAreWhole) {
  const TemporaryFolder folder;
  std::string text;
  for (const int length : {1 << 20, 3, (1 << 21) + 5, 1}) {
    text += "{\"text\": \"" + std::string(static_cast<std::size_t>(length), 'a') + "\"}\n";
  }
  const auto source = jsonl({folder.write("x.jsonl", text)}, byte_tokenizer());
  ASSERT_EQ(source->size(), 4);
  EXPECT_EQ(source->load(0).tokens.size(), (1U << 20) + 1);
  EXPECT_EQ(source->load(2).tokens.size(), (1U << 21) + 6);
  EXPECT_EQ(source->load(3).tokens.size(), 2U);
}

TEST(Jsonl, BlankFileIsRefused) {
  const TemporaryFolder folder;
  const std::string path = folder.write("x.jsonl", "\n \n");
  EXPECT_THAT(message_of<DataError>([&] { (void)jsonl({path}, nullptr); }), HasSubstr(path));
}

TEST(MemorySources, MaskOfAnotherSizeIsRefused) {
  EXPECT_THAT(message_of<DataError>([] {
                (void)documents({{{1, 2}, {1}}}, "mine");
              }),
              HasSubstr("mine[0]: loss_mask has 1 entries, tokens 2"));
}

TEST(MemorySources, IteratorIsReadToItsEndOrItsLimit) {
  int count = 0;
  const auto five = [&count]() -> std::optional<Document> {
    if (count++ == 5) return std::nullopt;
    return Document{{count, count}, {}};
  };
  EXPECT_EQ(iterator_source("five", five)->size(), 5);
  const auto endless = []() -> std::optional<Document> { return Document{{1, 2}, {}}; };
  EXPECT_THAT(message_of<DataError>([&] { (void)iterator_source("endless", endless, 9); }),
              HasSubstr("endless[4]"));
}

TEST(MemorySources, ConcatenationKeepsEachDocumentsIdentity) {
  const auto a = documents({{{1}, {}}, {{2}, {}}}, "a");
  const auto b = documents({{{3}, {}}}, "b");
  const auto both = concatenate({a, b});
  ASSERT_EQ(both->size(), 3);
  EXPECT_THAT(both->load(2).tokens, ElementsAre(3));
  EXPECT_EQ(both->describe(2), "b[0]");
  EXPECT_EQ(both->order_key(1), a->order_key(1));
  EXPECT_THROW((void)both->load(3), InvalidArgument);
  EXPECT_NE(both->fingerprint(), concatenate({b, a})->fingerprint());
}

TEST(Document, SliceCutsTheMaskToo) {
  const Document document{{1, 2, 3, 4}, {1, 0, 1, 1}};
  EXPECT_EQ(document.slice(1, 3), (Document{{2, 3}, {0, 1}}));
  EXPECT_EQ(document.slice(2, 3).loss_tokens(), 0);
  EXPECT_THROW((void)document.slice(1, 5), InvalidArgument);
}

}  // namespace
}  // namespace meshloom::data
