// What this core can do at most: INT8 multiply-adds a second, and bytes a second of weights that it reads.
//
//     g++ -std=gnu++17 -O3 -march=native floor.cpp -o floor && ./floor 10600000      # bytes of the weights
//
// Prints JSON. The best of many short runs: what else the machine does makes a run slower, never faster.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

static double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

template <class F>
static double best(int runs, F run) {
  double least = 1e9;
  for (int i = 0; i < runs; i++) {
    const double started = seconds();
    run();
    least = std::min(least, seconds() - started);
  }
  return least;
}

// Ten sums that do not wait for each other, so that only the number of units counts. `asm volatile`: the compiler
// must neither drop nor merge what has no use.
#if defined(__AVX512VNNI__)
typedef int32_t Vector __attribute__((vector_size(64)));
static const char* const INSTRUCTION = "vpdpbusd, 512 bits";
#define MULTIPLY_ADD(sum) asm volatile("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(inputs), "v"(weights))
#elif defined(__AVXVNNI__)
typedef int32_t Vector __attribute__((vector_size(32)));
static const char* const INSTRUCTION = "vpdpbusd, 256 bits";
#define MULTIPLY_ADD(sum) asm volatile("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(inputs), "x"(weights))
#elif defined(__AVX2__)
typedef int32_t Vector __attribute__((vector_size(32)));
static const char* const INSTRUCTION = "vpmaddubsw, vpmaddwd and vpaddd, 256 bits";
#define MULTIPLY_ADD(sum)                                                                               \
  {                                                                                                     \
    Vector pairs;                                                                                       \
    asm volatile("vpmaddubsw %3, %2, %1; vpmaddwd %4, %1, %1; vpaddd %1, %0, %0"                        \
                 : "+x"(sum), "=&x"(pairs) : "x"(inputs), "x"(weights), "x"(ones));                     \
  }
#else
#error "no INT8 instructions that this program knows"
#endif

static double multiply_adds_per_second() {
  constexpr int STEPS = 2000, SUMS = 10;
  const double least = best(3000, [] {
    Vector inputs = Vector{} + 0x01010101, weights = inputs;
    [[maybe_unused]] Vector ones = Vector{} + 0x00010001;
    Vector a{}, b{}, c{}, d{}, e{}, f{}, g{}, h{}, i{}, j{};
    for (int step = 0; step < STEPS; step++) {
      MULTIPLY_ADD(a); MULTIPLY_ADD(b); MULTIPLY_ADD(c); MULTIPLY_ADD(d); MULTIPLY_ADD(e);
      MULTIPLY_ADD(f); MULTIPLY_ADD(g); MULTIPLY_ADD(h); MULTIPLY_ADD(i); MULTIPLY_ADD(j);
    }
  });
  return double(STEPS) * SUMS * sizeof(Vector) / least;
}

static double bytes_per_second(size_t bytes) {
  constexpr size_t LINE = sizeof(Vector), BLOCK = 4 * LINE;
  bytes = (bytes + BLOCK - 1) / BLOCK * BLOCK;
  char* weights = (char*)aligned_alloc(BLOCK, bytes);
  memset(weights, 1, bytes);
  const double least = best(200, [&] {
    Vector sums[4]{};
    for (size_t at = 0; at < bytes; at += BLOCK)
      for (int i = 0; i < 4; i++) sums[i] += *(const Vector*)(weights + at + i * LINE);
    for (Vector& sum : sums) asm volatile("" : : "x"(sum));  // else nothing would have to be read
  });
  free(weights);
  return bytes / least;
}

int main(int, char** arguments) {
  printf("{\"instruction\": \"%s\", \"multiply_adds_per_s\": %.4g, \"weight_bytes_per_s\": %.4g}\n", INSTRUCTION,
         multiply_adds_per_second(), bytes_per_second(strtoull(arguments[1], nullptr, 10)));
}
