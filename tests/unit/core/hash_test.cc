#include "meshloom/core/hash.h"

#include <gtest/gtest.h>

#include <string>

namespace meshloom {
namespace {

TEST(HashBytes, AgreesWithTheReferenceImplementation) {
  EXPECT_EQ(hash_bytes(""), 0xEF46DB3751D8E999ULL);
  EXPECT_EQ(hash_bytes("a"), 0xD24EC4F1A98C6E5BULL);
  EXPECT_EQ(hash_bytes("abc"), 0x44BC2CF5AD770999ULL);
}

// From the xxhash library itself: XXH64 of the bytes 7 i + 1 (mod 256), at lengths around every
// block size of the algorithm.
TEST(HashBytes, AgreesAtEveryBlockBoundary) {
  struct Case {
    std::size_t length;
    std::uint64_t seed;
    std::uint64_t hash;
  };
  const Case cases[] = {
      {0, 0ULL, 0xEF46DB3751D8E999ULL},   {0, 12345ULL, 0x95584AF7701F808DULL},
      {1, 0ULL, 0x8A4127811B21E730ULL},   {1, 12345ULL, 0xE8D1E3A3A22AAB29ULL},
      {3, 0ULL, 0xB6E6C910C2FD373AULL},   {3, 12345ULL, 0xD9C8BFC6FFBD541BULL},
      {4, 0ULL, 0x22EDA2CF6AF4C124ULL},   {4, 12345ULL, 0xC41E7917DB8A4177ULL},
      {7, 0ULL, 0x34084D91A233A751ULL},   {7, 12345ULL, 0x177C809EA23971A1ULL},
      {8, 0ULL, 0xC6F1803A5E0B3222ULL},   {8, 12345ULL, 0x9FC901BCAB1C9B0FULL},
      {15, 0ULL, 0x514C6F58D37CE6F1ULL},  {15, 12345ULL, 0xD94A95B5FB40F627ULL},
      {31, 0ULL, 0x6AB1C40E29F50073ULL},  {31, 12345ULL, 0xE3C8D3EC5510D1D9ULL},
      {32, 0ULL, 0x5A0756FBE9ECD3D1ULL},  {32, 12345ULL, 0x0FFE847B96BF6863ULL},
      {33, 0ULL, 0xDC50CDC37BB9C183ULL},  {33, 12345ULL, 0xF74D82A7E7082DF9ULL},
      {63, 0ULL, 0x10DD94885C71894AULL},  {63, 12345ULL, 0x63151100AAA757E1ULL},
      {64, 0ULL, 0x90083DA9CDB9D795ULL},  {64, 12345ULL, 0x636584A6FC5943D2ULL},
      {100, 0ULL, 0xD248BFC5208B0B16ULL}, {100, 12345ULL, 0xF0F10949E40988DDULL},
      {200, 0ULL, 0xB2D27DD52E816618ULL}, {200, 12345ULL, 0x32E64F23B72BA06CULL},
  };
  std::string bytes;
  for (int i = 0; i < 200; ++i) bytes.push_back(static_cast<char>(7 * i + 1));
  for (const Case& c : cases) {
    EXPECT_EQ(hash_bytes(std::string_view(bytes).substr(0, c.length), c.seed), c.hash)
        << "length " << c.length << ", seed " << c.seed;
  }
}

TEST(HashBytes, EveryBitOfALongInputCounts) {
  std::string text(1000, 'x');
  const auto before = hash_bytes(text);
  for (const std::size_t at : {0UL, 31UL, 32UL, 500UL, 992UL, 999UL}) {
    text[at] ^= 1;
    EXPECT_NE(hash_bytes(text), before) << "byte " << at;
    text[at] ^= 1;
  }
}

}  // namespace
}  // namespace meshloom
