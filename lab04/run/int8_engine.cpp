// A BERT, DistilBERT, RoBERTa or ELECTRA classifier in INT8 on one core: token ids in, logits out.
//
//     g++ -std=gnu++17 -O3 -march=native -shared -fPIC -Wno-psabi -ffinite-math-only -fno-signed-zeros
//         -fno-math-errno int8_engine.cpp -o int8_engine.so
//
// To be read from top to bottom: 1. vectors, as wide as this processor's; 2. the functions of a network that are no
// products; 3. the INT8 product, where nine tenths of the time go; 4. the weights, packed for it; 5. the workspace;
// 6. the network; 7. what other languages call. docs/int8.md says what each idea is worth.
//
// Weights are int8 from -64 to 64 with one scale for each output. Inputs are uint8 with one scale and one zero point
// for each token, found while it runs: so no neighbour, no padding and no place in a batch changes an answer.
// Nothing here allocates while headlines run, or keeps anything between them.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

// --- 1. Vectors ------------------------------------------------------------------------------------------------
//
// LANES numbers of 32 bits are computed at once; GCC turns + and * of them into this processor's instructions. A
// product's tile of ROWS x VECTORS sums is as large as there are registers for: each weight that is read serves ROWS
// tokens, each input VECTORS * LANES columns. PLAIN and VNNI_256 are for the tests, which compare the kernels.

#if defined(__AVX512VNNI__) && !defined(VNNI_256)
constexpr int LANES = 16, ROWS = 8, VECTORS = 3;  // 24 of 32 registers
#elif defined(__AVXVNNI__) || defined(VNNI_256)
constexpr int LANES = 8, ROWS = 4, VECTORS = 3;  // 12 of 16, and three for weights, one for inputs
#else
constexpr int LANES = 8, ROWS = 5, VECTORS = 2;  // 10 of 16: products in two steps need registers between them
#endif
constexpr int COLUMNS = VECTORS * LANES;  // of a panel: the columns of a product that are computed at once
constexpr int QUERIES = 64 / LANES;       // of an attention that are computed at once

typedef float Floats __attribute__((vector_size(4 * LANES), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * LANES), may_alias));
typedef int8_t Signed __attribute__((vector_size(LANES), aligned(1), may_alias));
typedef uint8_t Bytes __attribute__((vector_size(LANES), aligned(1), may_alias));

#define INLINED __attribute__((always_inline))

static inline INLINED Floats load(const float* from) { return *(const Floats*)from; }
static inline INLINED Ints load(const int32_t* from) { return *(const Ints*)from; }
static inline INLINED void store(float* to, Floats value) { *(Floats*)to = value; }
static inline INLINED Floats all(float value) { return value - Floats{}; }
static inline INLINED Floats smaller(Floats a, Floats b) { return a < b ? a : b; }
static inline INLINED Floats larger(Floats a, Floats b) { return a > b ? a : b; }
static inline INLINED Floats plus(Floats a, Floats b) { return a + b; }

// Calls f(0) to f(N - 1), each index a constant: GCC keeps an array in registers only if it sees every index.
template <int... I, class F>
static inline INLINED void each(std::integer_sequence<int, I...>, F f) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int N, class F>
static inline INLINED void each(F f) {
  each(std::make_integer_sequence<int, N>{}, f);
}

// Sum, minimum or maximum of a vector's lanes, by halves.
template <int STEP = LANES / 2, class F>
static inline INLINED float across(Floats value, F combine) {
  Ints other;
  for (int lane = 0; lane < LANES; lane++) other[lane] = lane ^ STEP;
  value = combine(value, __builtin_shuffle(value, other));
  if constexpr (STEP > 1) return across<STEP / 2>(value, combine);
  return value[0];
}

// --- 2. Functions ----------------------------------------------------------------------------------------------

// Added to a float below 2^22 it leaves no bits for a fraction: rounds it, and the last bits are then the integer.
constexpr float ROUNDER = 12582912.f;  // 1.5 * 2^23

// e^x = 2^n e^r with |r| <= ln(2) / 2, by six terms of its series: at most 3e-6 of the result off.
static inline INLINED Floats exponential(Floats x) {
  x = larger(smaller(x, all(87.f)), all(-87.f));
  const Floats rounded = x * 1.44269504f + ROUNDER, n = rounded - ROUNDER;
  const Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;  // ln(2) in two parts, the first of few bits
  const Floats series = ((((r * (1.f / 120) + 1.f / 24) * r + 1.f / 6) * r + 0.5f) * r + 1) * r + 1;
  return (Floats)((Ints)series + ((Ints)rounded << 23));  // adds n to the exponent
}

// GELU is x * sigmoid(x * p(x^2)). The tanh form (Hendrycks and Gimpel, arXiv:1606.08415) is so exactly, with a p of
// two terms: -2 sqrt(2 / pi) (1 + 0.044715 x^2). For the exact one, x * Phi(x), five terms fitted by least squares
// under growing weights are at most 4e-6 off, for any x; beyond x = 6 the last p serves, where nothing is left to say.
struct Gelu {
  float terms[5];
};
constexpr Gelu ERF_GELU{{-1.59565627f, -0.072937582f, 0.000249723349f, 6.11619973e-05f, -2.23816349e-06f}};
constexpr Gelu TANH_GELU{{-1.59576912f, -0.0713548163f, 0, 0, 0}};

static inline INLINED Floats gelu(Floats x, const Gelu& p) {
  const Floats x2 = smaller(x * x, all(36.f));
  Floats sum = all(p.terms[4]);
  for (int term = 3; term >= 0; term--) sum = sum * x2 + p.terms[term];
  return x / (exponential(x * sum) + 1);
}

enum Activation : int32_t { NONE, ERF, TANH_FORM, TANH, RELU };  // ERF and TANH_FORM are GELUs

static void activate(Activation activation, float* x, int width) {
  const Gelu& terms = activation == ERF ? ERF_GELU : TANH_GELU;
  for (int k = 0; k < width; k += LANES) {
    const Floats value = load(x + k);
    if (activation == RELU)
      store(x + k, larger(value, all(0)));
    else if (activation == TANH)
      store(x + k, 1 - 2 / (exponential(2 * value) + 1));
    else
      store(x + k, gelu(value, terms));
  }
}

struct Norm {
  float *weights, *biases;  // [width]
};

// LayerNorm of each row, in its place.
static void normalise(float* x, int stride, int rows, int width, const Norm& norm, float epsilon) {
  for (int row = 0; row < rows; row++, x += stride) {
    Floats sum{}, squares{};
    for (int k = 0; k < width; k += LANES) sum += load(x + k);
    const Floats mean = all(across(sum, plus) / width);
    for (int k = 0; k < width; k += LANES) squares += (load(x + k) - mean) * (load(x + k) - mean);
    const Floats inverse = all(1 / std::sqrt(across(squares, plus) / width + epsilon));
    for (int k = 0; k < width; k += LANES)
      store(x + k, (load(x + k) - mean) * inverse * load(norm.weights + k) + load(norm.biases + k));
  }
}

// Attention of one headline: the first `queries` of its tokens look at all of them. Row strides are in floats; values
// follow the keys in a row. `keys_by_size` [size, padded] and `scores` [QUERIES, padded] are scratch.
static void attend(const float* query, int stride, const float* key, int key_stride, int tokens, int queries, int heads,
                   int size, float* context, float* keys_by_size, float* scores) {
  const int padded = (tokens + LANES - 1) / LANES * LANES;
  const float scale = 1 / std::sqrt((float)size);
  for (int head = 0; head < heads; head++, query += size, key += size, context += size) {
    const float* value = key + heads * size;
    for (int token = 0; token < tokens; token++)
      for (int k = 0; k < size; k++) keys_by_size[k * padded + token] = key[(size_t)token * key_stride + k];
    for (int first = 0; first < queries; first += QUERIES) {
      const float* rows[QUERIES];  // of a last group that is not full one query is computed again
      each<QUERIES>([&](auto i) INLINED { rows[i] = query + (size_t)std::min(first + i, queries - 1) * stride; });
      for (int token = 0; token < padded; token += LANES) {
        Floats sum[QUERIES]{};
        for (int k = 0; k < size; k++) {
          const Floats keys = load(keys_by_size + k * padded + token);
          each<QUERIES>([&](auto i) INLINED { sum[i] += keys * rows[i][k]; });
        }
        each<QUERIES>([&](auto i) INLINED { store(scores + i * padded + token, sum[i] * scale); });
      }
      float inverse[QUERIES];  // softmax; what a row is to be divided by is left for its sum of values
      for (int i = 0; i < QUERIES; i++) {
        float* row = scores + i * padded;
        for (int token = tokens; token < padded; token++) row[token] = -1e30f;
        Floats most = load(row), sum{};
        for (int token = LANES; token < padded; token += LANES) most = larger(most, load(row + token));
        most = all(across(most, larger));
        for (int token = 0; token < padded; token += LANES) {
          const Floats power = exponential(load(row + token) - most);
          store(row + token, power);
          sum += power;
        }
        inverse[i] = 1 / across(sum, plus);
      }
      for (int k = 0; k < size; k += LANES) {
        Floats sum[QUERIES]{};
        for (int token = 0; token < tokens; token++) {
          const Floats values = load(value + (size_t)token * key_stride + k);
          each<QUERIES>([&](auto i) INLINED { sum[i] += values * scores[i * padded + token]; });
        }
        each<QUERIES>([&](auto i) INLINED {
          if (first + i < queries) store(context + (size_t)(first + i) * stride + k, sum[i] * inverse[i]);
        });
      }
    }
  }
}

// --- 3. The INT8 product ---------------------------------------------------------------------------------------

struct Linear {
  int inputs, outputs, columns;  // columns: the outputs, filled up to whole panels by weights of 0
  int8_t* weights;               // [columns / COLUMNS, inputs / 4, COLUMNS, 4]: read from first to last, in a row
  float *scales, *biases;        // [columns]
  int32_t* sums;                 // [columns] of the weights of a column
  float* input_scales;           // [inputs]: what each input is multiplied by before it is rounded
};

static int whole_panels(int outputs) { return (outputs + COLUMNS - 1) / COLUMNS * COLUMNS; }

struct Quantised {  // rows of `inputs` bytes; a byte b stands for (b - zero) * scale
  uint8_t* bytes;
  float* scales;
  int32_t* zeros;
};

// Rounds each row to 8 bits, from its smallest to its largest entry, for a product.
static void quantise(const float* x, int stride, int rows, const Linear& linear, Quantised& out) {
  const int width = linear.inputs;
  const float* factor = linear.input_scales;
  for (int row = 0; row < rows; row++, x += stride) {
    Floats low{}, high{};  // 0 is always among what can be said exactly
    for (int k = 0; k < width; k += LANES) {
      const Floats value = load(x + k) * load(factor + k);
      low = smaller(low, value);
      high = larger(high, value);
    }
    const float least = across(low, smaller), range = across(high, larger) - least;
    const float scale = range > 1e-30f ? range / 255 : 1;
    const float zero = std::nearbyint(-least / scale), inverse = 1 / scale;
    uint8_t* __restrict bytes = out.bytes + (size_t)row * width;
    for (int k = 0; k < width; k++) {  // which GCC makes vectors of itself, and better ones
      const float value = std::max(std::min(x[k] * factor[k] * inverse, 255 - zero), -zero) + (ROUNDER + zero);
      int32_t bits;
      memcpy(&bits, &value, sizeof bits);
      bytes[k] = (uint8_t)bits;
    }
    out.scales[row] = scale;
    out.zeros[row] = (int32_t)zero;
  }
}

// sum[lane] += four[0] * weights[lane][0] + ... + four[3] * weights[lane][3]; `four` is the same in every lane.
static inline INLINED void multiply_add(Ints& sum, Ints four, Ints weights) {
#if defined(PLAIN) || !defined(__AVX2__)
  const Bytes* inputs = (const Bytes*)&four;
  const int8_t* factors = (const int8_t*)&weights;
  for (int lane = 0; lane < LANES; lane++)
    for (int k = 0; k < 4; k++) sum[lane] += (*inputs)[k] * factors[4 * lane + k];
#elif defined(__AVX512VNNI__)
  // As assembly: given the intrinsic, GCC 12 moves the sums through memory, which takes two to three times as long.
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(four), "v"(weights));
#elif defined(__AVXVNNI__)
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(four), "x"(weights));
#else  // two products meet in 16 bits: 2 * 255 * 64 just fits, which is why weights have 7 bits
  const __m256i pairs = _mm256_maddubs_epi16((__m256i)four, (__m256i)weights);
  sum += (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#endif
}

// One tile: R rows from `row` on times the panel that begins at `column`. Sums, zero points, scales, biases and, with
// `add`, what stood in `out` meet in registers.
template <int R>
static void multiply(const Quantised& x, int row, const Linear& linear, int column, bool add, float* out) {
  const size_t inputs = linear.inputs;
  const uint8_t* bytes = x.bytes + row * inputs;
  const int8_t* weights = linear.weights + column * inputs;
  const int8_t* const end = weights + COLUMNS * inputs;
  Ints sum[R * VECTORS];  // they begin with what the zero points would add too much
  each<R * VECTORS>([&](auto i) INLINED {
    sum[i] = load(linear.sums + column + i % VECTORS * LANES) * -x.zeros[row + i / VECTORS];
  });
  for (; weights != end; weights += 4 * COLUMNS, bytes += 4) {
    // The next panel, or the next Linear, comes from the shared cache while this one is multiplied. One row alone is as
    // quick as the weights come: the processor's own reading ahead has more lines under way than can be asked for.
    for (int line = 0; R > 1 && line < 4 * COLUMNS; line += 64)
      __builtin_prefetch(weights + COLUMNS * inputs + line, 0, 2);
    Ints factors[VECTORS];
    each<VECTORS>([&](auto v) INLINED { factors[v] = *(const Ints*)(weights + v * 4 * LANES); });
    each<R>([&](auto r) INLINED {
      int32_t four;
      memcpy(&four, bytes + r * inputs, 4);
      const Ints same = four - Ints{};
      each<VECTORS>([&](auto v) INLINED { multiply_add(sum[r * VECTORS + v], same, factors[v]); });
    });
  }
  each<VECTORS>([&](auto v) INLINED {
    const int at = column + v * LANES;
    const Floats scale = load(linear.scales + at), bias = load(linear.biases + at);
    each<R>([&](auto r) INLINED {
      float* to = out + (size_t)(row + r) * linear.columns + at;
      Floats value = __builtin_convertvector(sum[r * VECTORS + v], Floats) * (scale * x.scales[row + r]) + bias;
      if (add) value += load(to);
      store(to, value);
    });
  });
}

using Kernel = void (*)(const Quantised&, int, const Linear&, int, bool, float*);
template <int... R>
static Kernel kernel_of(int rows, std::integer_sequence<int, R...>) {
  static constexpr Kernel kernels[] = {multiply<R + 1>...};
  return kernels[rows - 1];
}

// out [rows, columns] = x times weights; `activation` follows it, or it is added to `out`.
static void product(const Quantised& x, int rows, const Linear& linear, Activation activation, bool add, float* out) {
  const int tiles = (rows + ROWS - 1) / ROWS;
  for (int column = 0; column < linear.columns; column += COLUMNS) {
    for (int tile = 0, row = 0; tile < tiles; tile++) {
      const int count = (rows - row + tiles - tile - 1) / (tiles - tile);  // as even as can be: 17 are 6 + 6 + 5
      kernel_of(count, std::make_integer_sequence<int, ROWS>{})(x, row, linear, column, add, out);
      row += count;
    }
    if (activation != NONE)  // while the panel's results are at hand
      for (int row = 0; row < rows; row++) activate(activation, out + (size_t)row * linear.columns + column, COLUMNS);
  }
}

// --- 4. The weights --------------------------------------------------------------------------------------------

struct Shape {  // as the weights file says it
  int32_t layers, hidden, heads, intermediate, labels, embedding, words, positions, types, first_position;
  Activation activation, head_activation;
  float epsilon;
};

// Pieces of one block, each on cache lines of its own. From address 0 it only counts how large the block must be.
struct Memory {
  uintptr_t next = 0;
  template <class T>
  T* take(size_t count) {
    T* piece = (T*)next;
    next += (count * sizeof(T) + 63) / 64 * 64;
    return piece;
  }
};

// A block for all that `owner.place(memory)` takes; null if there is no memory. Huge pages: else the weights' way to
// the core waits for page tables.
template <class Owner>
static bool allocate(Owner& owner, bool huge_pages) {
  constexpr size_t PAGE = 2 << 20;
  Memory counted, real;
  owner.place(counted);
  const size_t bytes = (counted.next + PAGE - 1) / PAGE * PAGE;
  owner.block = aligned_alloc(PAGE, bytes);
  if (!owner.block) return false;
#if defined(MADV_HUGEPAGE)
  if (huge_pages) madvise(owner.block, bytes, MADV_HUGEPAGE);
#endif
  real.next = (uintptr_t)owner.block;
  owner.place(real);
  return true;
}

struct Table {  // embeddings: row i is rows[i] * scales[i]
  const int8_t* rows;
  const float* scales;
};

struct Layer {
  Linear key_value, query, output, up, down;
  Norm attention_norm, norm;
};

struct Model {
  Shape shape;
  Table words, positions, types;
  Norm norm;
  Linear project, head, classifier;  // project: where embeddings are narrower than the layers, as ELECTRA's
  std::vector<Layer> layers;
  void* block = nullptr;
  ~Model() { free(block); }

  template <class L, class N>
  void visit(L linear, N norm_of) {  // every part in the order of the weights file, which is that of their use
    const int hidden = shape.hidden;
    norm_of(norm, shape.embedding);
    if (shape.embedding != hidden) linear(project, shape.embedding, hidden);
    for (Layer& layer : layers) {
      linear(layer.key_value, hidden, 2 * hidden);
      linear(layer.query, hidden, hidden);
      linear(layer.output, hidden, hidden);
      norm_of(layer.attention_norm, hidden);
      linear(layer.up, hidden, shape.intermediate);
      linear(layer.down, shape.intermediate, hidden);
      norm_of(layer.norm, hidden);
    }
    linear(head, hidden, hidden);
    linear(classifier, hidden, shape.labels);
  }

  void place(Memory& memory) {
    visit(
        [&](Linear& linear, int inputs, int outputs) {
          const int columns = whole_panels(outputs);
          linear.inputs = inputs, linear.outputs = outputs, linear.columns = columns;
          linear.scales = memory.take<float>(columns);
          linear.biases = memory.take<float>(columns);
          linear.sums = memory.take<int32_t>(columns);
          linear.input_scales = memory.take<float>(inputs);
          linear.weights = memory.take<int8_t>((size_t)columns * inputs);
        },
        [&](Norm& norm, int width) { norm = {memory.take<float>(width), memory.take<float>(width)}; });
  }
};

// Packs weights [outputs, inputs] for the product; false if one of them is beyond 7 bits.
static bool pack(const int8_t* weights, const Linear& linear) {
  for (int column = 0; column < linear.columns; column++) {
    int32_t sum = 0;
    int8_t* to = linear.weights + (size_t)(column / COLUMNS) * COLUMNS * linear.inputs + column % COLUMNS * 4;
    for (int k = 0; k < linear.inputs; k += 4, to += 4 * COLUMNS) {
      int8_t four[4]{};
      if (column < linear.outputs) memcpy(four, weights + (size_t)column * linear.inputs + k, 4);
      for (int8_t weight : four) {
        if (weight < -64 || weight > 64) return false;
        sum += weight;
      }
      memcpy(to, four, 4);
    }
    linear.sums[column] = sum;
  }
  return true;
}

static bool sound(const Shape& s) {
  for (int32_t width : {s.hidden, s.intermediate, s.embedding, s.hidden / std::max(s.heads, 1)})
    if (width < 16 || width % 16 || width > 65536) return false;  // wider sums would not fit into 32 bits
  for (int32_t count : {s.layers, s.heads, s.labels, s.words, s.types})
    if (count < 1) return false;
  return s.hidden % s.heads == 0 && s.first_position >= 0 && s.positions > s.first_position &&
         (s.activation == ERF || s.activation == TANH_FORM) && s.head_activation >= NONE && s.head_activation <= RELU;
}

// --- 5. The workspace ------------------------------------------------------------------------------------------

struct Workspace {  // all that one call writes, for at most `room` tokens
  Shape shape;
  int room, headlines, tokens;
  int64_t *ids, *types;  // [tokens]: the texts' end to end
  int32_t* lengths;      // [headlines]
  float *hidden, *query, *key_value, *context, *intermediate, *keys_by_size, *scores;
  Quantised quantised;
  void* block = nullptr;
  Workspace(const Shape& shape, int room) : shape(shape), room(room) {}
  ~Workspace() { free(block); }

  void place(Memory& memory) {
    ids = memory.take<int64_t>(room);
    types = memory.take<int64_t>(room);
    lengths = memory.take<int32_t>(room);
    auto rows = [&](int width) { return memory.take<float>((size_t)room * whole_panels(width)); };
    const int widest = std::max(shape.intermediate, std::max(shape.hidden, shape.embedding));
    hidden = rows(shape.hidden);
    query = rows(shape.hidden);
    key_value = rows(2 * shape.hidden);
    context = rows(std::max(shape.hidden, shape.embedding));
    intermediate = rows(std::max(shape.intermediate, shape.labels));
    keys_by_size = memory.take<float>((size_t)shape.hidden / shape.heads * (room + LANES));
    scores = memory.take<float>((size_t)QUERIES * (room + LANES));
    quantised.bytes = memory.take<uint8_t>((size_t)room * widest);
    quantised.scales = memory.take<float>(room);
    quantised.zeros = memory.take<int32_t>(room);
  }
};

// --- 6. The network --------------------------------------------------------------------------------------------

enum Refusal : int32_t { NOTHING, LENGTH, UNKNOWN };

// Lays the tokens that the mask keeps end to end: nothing is computed for padding, on whichever side it is.
static Refusal gather(Workspace& w, const int64_t* ids, const int64_t* types, const int64_t* mask, int headlines,
                      int width) {
  w.headlines = headlines, w.tokens = 0;
  for (int headline = 0; headline < headlines; headline++) {
    const int before = w.tokens;
    for (int k = headline * width; k < (headline + 1) * width; k++) {
      if (!mask[k]) continue;
      const int64_t type = types ? types[k] : 0;
      if (ids[k] < 0 || ids[k] >= w.shape.words || type < 0 || type >= w.shape.types) return UNKNOWN;
      if (w.tokens == w.room) return LENGTH;
      w.ids[w.tokens] = ids[k];
      w.types[w.tokens++] = type;
    }
    w.lengths[headline] = w.tokens - before;
    if (w.tokens == before || w.tokens - before > w.shape.positions - w.shape.first_position) return LENGTH;
  }
  return NOTHING;
}

static inline INLINED Floats embedded(const Table& table, int64_t row, int width, int k) {
  const Signed bytes = *(const Signed*)(table.rows + row * width + k);
  return __builtin_convertvector(bytes, Floats) * table.scales[row];
}

// Sums of word, position and type, a row a token. Positions count from `first_position` on; before it is the padding
// id, whose token, should a text contain one, has no place among the others (RoBERTa).
static void embed(const Model& model, const Workspace& w, float* out, int stride) {
  const int width = model.shape.embedding, first = model.shape.first_position;
  const int64_t *ids = w.ids, *types = w.types;
  for (int headline = 0; headline < w.headlines; headline++)
    for (int token = 0, read = first; token < w.lengths[headline]; token++, ids++, types++, out += stride) {
      const int position = *ids == first - 1 ? first - 1 : read++;
      for (int k = 0; k < width; k += LANES)
        store(out + k, embedded(model.words, *ids, width, k) + embedded(model.positions, position, width, k) +
                           embedded(model.types, *types, width, k));
    }
}

// Moves the first token of each headline to the front: with it the last layer goes on, the classifier reads no other.
static void keep_first_tokens(Workspace& w, int stride) {
  const size_t width = w.shape.hidden;
  Quantised& q = w.quantised;
  for (int headline = 0, token = 0; headline < w.headlines; token += w.lengths[headline++]) {
    memmove(w.hidden + (size_t)headline * stride, w.hidden + (size_t)token * stride, width * sizeof(float));
    memmove(q.bytes + headline * width, q.bytes + token * width, width);
    q.scales[headline] = q.scales[token];
    q.zeros[headline] = q.zeros[token];
  }
}

static void classify(const Model& model, Workspace& w, float* logits) {
  const Shape& shape = model.shape;
  const int width = shape.hidden, stride = model.head.columns, headlines = w.headlines, tokens = w.tokens;
  Quantised& q = w.quantised;
  // x is rounded for a Linear, and multiplied; what follows is `activation`, or the sum with what was in `out`.
  auto apply = [&](const float* x, int x_stride, int rows, const Linear& linear, Activation activation, bool add,
                   float* out) {
    quantise(x, x_stride, rows, linear, q);
    product(q, rows, linear, activation, add, out);
  };

  const bool projects = shape.embedding != width;
  float* const sums = projects ? w.context : w.hidden;
  const int sums_stride = projects ? shape.embedding : stride;
  embed(model, w, sums, sums_stride);
  normalise(sums, sums_stride, tokens, shape.embedding, model.norm, shape.epsilon);
  if (projects) apply(sums, sums_stride, tokens, model.project, NONE, false, w.hidden);

  for (const Layer& layer : model.layers) {
    const bool last = &layer == &model.layers.back();
    const int rows = last ? headlines : tokens;
    apply(w.hidden, stride, tokens, layer.key_value, NONE, false, w.key_value);
    if (last) keep_first_tokens(w, stride);
    product(q, rows, layer.query, NONE, false, w.query);
    for (int headline = 0, token = 0; headline < headlines; token += w.lengths[headline++]) {
      const size_t row = last ? headline : token;
      const int pair = layer.key_value.columns, length = w.lengths[headline];
      attend(w.query + row * stride, stride, w.key_value + (size_t)token * pair, pair, length, last ? 1 : length,
             shape.heads, width / shape.heads, w.context + row * stride, w.keys_by_size, w.scores);
    }
    apply(w.context, stride, rows, layer.output, NONE, true, w.hidden);
    normalise(w.hidden, stride, rows, width, layer.attention_norm, shape.epsilon);
    apply(w.hidden, stride, rows, layer.up, shape.activation, false, w.intermediate);
    apply(w.intermediate, layer.up.columns, rows, layer.down, NONE, true, w.hidden);
    normalise(w.hidden, stride, rows, width, layer.norm, shape.epsilon);
  }

  apply(w.hidden, stride, headlines, model.head, shape.head_activation, false, w.query);
  apply(w.query, stride, headlines, model.classifier, NONE, false, w.intermediate);
  for (int headline = 0; headline < headlines; headline++)
    memcpy(logits + (size_t)headline * shape.labels, w.intermediate + (size_t)headline * model.classifier.columns,
           shape.labels * sizeof(float));
}

// --- 7. What other languages call ------------------------------------------------------------------------------

extern "C" {

// A model of the tensors in the order of the weights file (lab04/run/int8_engine.py). The three embedding tables are
// used where they lie, everything else is copied. Null if the shape is none it can run, a weight has more than 7 bits,
// or memory is short.
Model* engine_load(const Shape* shape, const void* const* tensors) {
  if (!sound(*shape)) return nullptr;
  Model* model = new (std::nothrow) Model;
  if (!model) return nullptr;
  model->shape = *shape;
  model->layers.resize(shape->layers);
  if (!allocate(*model, true)) return delete model, nullptr;
  for (Table* table : {&model->words, &model->positions, &model->types}) {
    table->rows = (const int8_t*)*tensors++;
    table->scales = (const float*)*tensors++;
  }
  bool packed = true;
  auto copy = [&](float* to, int filled, int width) {  // a panel's columns beyond the last output are 0
    memset(to, 0, filled * sizeof(float));
    memcpy(to, *tensors++, width * sizeof(float));
  };
  model->visit(
      [&](Linear& linear, int inputs, int outputs) {
        packed &= pack((const int8_t*)*tensors++, linear);
        copy(linear.scales, linear.columns, outputs);
        copy(linear.biases, linear.columns, outputs);
        copy(linear.input_scales, inputs, inputs);
      },
      [&](Norm& norm, int width) {
        copy(norm.weights, width, width);
        copy(norm.biases, width, width);
      });
  if (!packed) return delete model, nullptr;
  return model;
}

void engine_unload(Model* model) { delete model; }

// Room for calls of at most `tokens` tokens, one call at a time; null if memory is short.
Workspace* engine_new_workspace(const Model* model, int tokens) {
  Workspace* workspace = new (std::nothrow) Workspace(model->shape, tokens);
  if (workspace && !allocate(*workspace, false)) return delete workspace, nullptr;
  return workspace;
}

void engine_free_workspace(Workspace* workspace) { delete workspace; }

// Logits [headlines, labels] of headlines whose token ids, types and mask are rows of `width`; null types are all 0.
// Returns why it refuses: LENGTH for a text without a token, or more of them than model or workspace take.
Refusal engine_logits(const Model* model, Workspace* workspace, const int64_t* ids, const int64_t* types,
                      const int64_t* mask, int headlines, int width, float* logits) {
  const Refusal refusal = gather(*workspace, ids, types, mask, headlines, width);
  if (refusal == NOTHING) classify(*model, *workspace, logits);
  return refusal;
}
}
