/* 1-bit linear algebra: pack floats into bits, multiply bit matrices, attend.
 *
 * Bits of a row: word w of 32, bit j (LSB first) is column 32 w + j; 1 means +1, 0 means -1. A row has an even number of
 * words, unused bits are 0. A product of two rows of k signs is k - 2 popcount(a xor b).
 * Weights lie in panels of 32 output columns: panels[n / 32][word][32], unused columns 0, so that neighbouring lanes of a
 * vector belong to neighbouring output columns and no horizontal sum is needed.
 *
 * Every exported function takes the path first (see `binaryad_best_isa`) and the number of threads second. Arrays are dense
 * and row-major, and are not checked: the callers (the operators in this folder) do that.
 */
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#define X86 1
#include <immintrin.h>
#if defined(__clang__) || __GNUC__ >= 10 /* older ones do not know these instructions */
#define BFLOAT16 1
#endif
#elif defined(__aarch64__)
#define NEON 1
#include <arm_neon.h>
#endif

#define INLINE static inline __attribute__((always_inline))

enum { ISA_SCALAR = 0, ISA_NEON = 1, ISA_AVX2 = 2, ISA_AVX512 = 3, ISA_COUNT = 4 };
enum {
    PANEL = 32,                  /* output columns side by side */
    ROW_BLOCK = 32,              /* rows that one thread takes at a time */
    WORDS_PER_BYTE_COUNTER = 31, /* a byte counter grows by at most 8 per word */
    ATTENTION_ROWS = 16,         /* tokens that attention takes at a time */
    MOST_PROTOTYPES = 64
};

#define SMALLEST_SCALE 1e-6f       /* as in binarize/attention.py */
#define SMALLEST_NORM 1e-12f       /* as in torch.nn.functional.normalize */
#define LINEAR_ATTENTION_EPS 1e-8f /* as in models/layers.py */

INLINE int64_t words_of(int64_t k) { return 2 * ((k + 63) / 64); }

/* Set bits of a word; in this form compilers turn a loop over words into vector code on every machine. */
INLINE uint32_t count_bits(uint32_t word) {
    word -= (word >> 1) & 0x55555555u;
    word = (word & 0x33333333u) + ((word >> 2) & 0x33333333u);
    word = (word + (word >> 4)) & 0x0f0f0f0fu;
    return (word * 0x01010101u) >> 24;
}

/* What becomes of the mismatch counts p (k - 2 p is the product) of one row and one panel. */
typedef struct {
    int64_t k, n, words;
    const float *scale, *bias, *residual; /* to floats: scale (k - 2 p) + bias (+ residual) */
    float *out;
    const int32_t *low, *span; /* to bits: outside [low, low + span], compared without sign */
    uint32_t *out_bits;
} Product;

/* Everything of one layer but the queries. Keys are normalised and transposed: keys[image][head][d][prototypes_padded]. */
typedef struct {
    int64_t tokens, prototypes, padded, heads, d;
    const float *keys, *values;   /* values (images, prototypes, stride), of which heads * d columns are used */
    int64_t value_stride;
    const float *head_scale;      /* (heads) */
    const float *share;           /* (heads): a map entry is binary 1 from share * row maximum on; null: no binary part */
    const float *slope, *middle;  /* (heads): gate = sigmoid(slope (row maximum / |head scale| - middle)); null: gate 1 */
} Attention;

/* Everything of one layer of linear attention. */
typedef struct {
    int64_t tokens, heads, d;
    const float *projected; /* (images * tokens, 3 * heads * d): queries, keys, values; or null, then */
    const uint32_t *input, *panels; /* the bits of the input and the binary layer that projects them a few rows at a time; */
    const float *scale, *bias;      /* d must be a multiple of PANEL */
    float *summaries;       /* (images, heads, d + 1, d): sums over the tokens of phi(key) value^T, then of phi(key) */
    const float *threshold; /* (heads * d), for bits */
    uint32_t *bits;         /* the output's bits, or null */
    float *out;             /* else (images * tokens, heads * d) */
} LinearAttention;

/* A decoder block from the bits of its attention on; `residual` (rows, width) may be null, `out` is (rows, width). */
typedef struct {
    int64_t width, hidden;
    const uint32_t *bits, *proj_panels;
    const float *proj_scale, *proj_bias, *residual;
    const float *norm_weight, *norm_bias, *threshold;
    float eps;
    const uint32_t *fc1_panels;
    const int32_t *low, *span;
    const uint32_t *fc2_panels;
    const float *fc2_scale, *fc2_bias;
    float *out;
} BlockTail;

/* ------------------------------------------------------------------ one path per instruction set -------------------- */

#define JOIN(name, suffix) name##_##suffix

#define NAME(name) JOIN(name, scalar)
#define PATH_SCALAR 1
#include "path.h"
#undef PATH_SCALAR
#undef NAME

#if NEON
#define NAME(name) JOIN(name, neon)
#define PATH_NEON 1
#include "path.h"
#undef PATH_NEON
#undef NAME
#endif

#if X86
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi2,popcnt"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi2,popcnt")
#endif
#define NAME(name) JOIN(name, avx2)
#define PATH_AVX2 1
#include "path.h"
#undef PATH_AVX2
#undef NAME
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vpopcntdq,avx2,fma,bmi2,popcnt"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vpopcntdq,avx2,fma,bmi2,popcnt,prefer-vector-width=512")
#endif
#define NAME(name) JOIN(name, avx512)
#define PATH_AVX512 1
#include "path.h"
#undef PATH_AVX512
#undef NAME
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

#if BFLOAT16
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,prefer-vector-width=512")
#endif
#include "attention.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

typedef struct {
    void (*pack_rows)(const float *, int64_t, int64_t, int64_t, const float *, uint32_t *);
    void (*layer_norm_pack_rows)(const float *, int64_t, int64_t, int64_t, const float *, const float *, float, const float *,
                                 uint32_t *);
    void (*multiply)(const Product *, const uint32_t *, const uint32_t *, int64_t, int64_t);
    void (*attend_blocks)(const Attention *, const float *, int64_t, int64_t, const float *, uint32_t *);
    void (*summarise)(const LinearAttention *, int64_t);
    void (*attend_linear_blocks)(const LinearAttention *, int64_t, int64_t);
    void (*project_and_transform)(const BlockTail *, int64_t, int64_t);
    void (*quantize_rows)(const float *, int64_t, int64_t, int64_t, uint8_t *, float *);
    void (*layer_norm_quantize_rows)(const float *, int64_t, int64_t, int64_t, const float *, const float *, float, uint8_t *,
                                     float *);
    void (*gelu_quantize_rows)(const float *, int64_t, int64_t, int64_t, const float *, const float *, uint8_t *, float *);
    void (*rescale_rows)(const float *, int64_t, int64_t, int64_t, const float *, const float *, const float *, const float *,
                         float *);
} Path;

#define PATH_OF(suffix)                                                                                              \
    {pack_rows_##suffix,     layer_norm_pack_rows_##suffix,     multiply_##suffix,              attend_blocks_##suffix, \
     summarise_##suffix,     attend_linear_blocks_##suffix,     project_and_transform_##suffix, quantize_rows_##suffix, \
     layer_norm_quantize_rows_##suffix, gelu_quantize_rows_##suffix, rescale_rows_##suffix}
static const Path PATHS[ISA_COUNT] = {
    [ISA_SCALAR] = PATH_OF(scalar),
#if NEON
    [ISA_NEON] = PATH_OF(neon),
#endif
#if X86
    [ISA_AVX2] = PATH_OF(avx2),
    [ISA_AVX512] = PATH_OF(avx512),
#endif
};

/* Run `call` for blocks [first, last) of at most `step` of `count` rows, on `threads` threads. */
#define PRAGMA(text) _Pragma(#text)
#ifdef _OPENMP
#define PARALLEL(threads) PRAGMA(omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1))
#else
#define PARALLEL(threads) (void)threads;
#endif
#define FOR_BLOCKS(count, step, call)                                               \
    const int64_t blocks = ((count) + (step) - 1) / (step);                         \
    PARALLEL(threads)                                                               \
    for (int64_t block = 0; block < blocks; ++block) {                              \
        const int64_t first = block * (step);                                       \
        const int64_t last = first + (step) < (count) ? first + (step) : (count);   \
        call;                                                                       \
    }

/* ------------------------------------------------------------------ exported ---------------------------------------- */

/* The best path of this machine. */
int binaryad_best_isa(void) {
#if X86
    __builtin_cpu_init();
    const int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    const int avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                       __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                       __builtin_cpu_supports("avx512vpopcntdq");
    return avx2 && avx512 ? ISA_AVX512 : avx2 ? ISA_AVX2 : ISA_SCALAR;
#elif NEON
    return ISA_NEON;
#else
    return ISA_SCALAR;
#endif
}

/* Whether `threads` has an effect. */
int binaryad_has_threads(void) {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

/* x (rows, k) -> bits of x >= threshold (k). */
void binaryad_pack(int isa, int threads, const float *x, int64_t rows, int64_t k, const float *threshold, uint32_t *bits) {
    FOR_BLOCKS(rows, ROW_BLOCK, PATHS[isa].pack_rows(x, first, last, k, threshold, bits))
}

/* x (rows, k) -> bits of layer_norm(x) >= threshold (k). */
void binaryad_layer_norm_pack(int isa, int threads, const float *x, int64_t rows, int64_t k, const float *weight,
                              const float *bias, float eps, const float *threshold, uint32_t *bits) {
    FOR_BLOCKS(rows, ROW_BLOCK, PATHS[isa].layer_norm_pack_rows(x, first, last, k, weight, bias, eps, threshold, bits))
}

/* out (rows, n) = scale (n) * (k - 2 mismatches) + bias (n) (+ residual (rows, n), which may be null or `out` itself). */
void binaryad_linear(int isa, int threads, const uint32_t *bits, int64_t rows, const uint32_t *panels, int64_t k, int64_t n,
                     const float *scale, const float *bias, const float *residual, float *out) {
    const Product product = {k, n, words_of(k), scale, bias, residual, out, 0, 0, 0};
    FOR_BLOCKS(rows, ROW_BLOCK, PATHS[isa].multiply(&product, bits, panels, first, last))
}

/* Bits (rows, n): 0 where low <= mismatches <= low + span, else 1 (mismatches - low > span without sign). */
void binaryad_linear_to_bits(int isa, int threads, const uint32_t *bits, int64_t rows, const uint32_t *panels, int64_t k,
                             int64_t n, const int32_t *low, const int32_t *span, uint32_t *out_bits) {
    const Product product = {k, n, words_of(k), 0, 0, 0, 0, low, span, out_bits};
    const int64_t words = words_of(n);
    if (32 * words - n >= PANEL) /* no panel writes the last word */
        for (int64_t row = 0; row < rows; ++row) out_bits[(row + 1) * words - 1] = 0;
    FOR_BLOCKS(rows, ROW_BLOCK, PATHS[isa].multiply(&product, bits, panels, first, last))
}

/* query (images, tokens, heads * d), projected (images, prototypes, 2 * heads * d: keys, then values) -> bits of the
 * attention's output at `threshold` (heads * d). At most 64 prototypes and 4096 channels (16 rows live on the stack).
 * `keys` is scratch of images * heads * d * padded floats, padded = prototypes rounded up to 16.
 */
void binaryad_prototype_attention(int isa, int threads, const float *query, int64_t images, int64_t tokens,
                                  const float *projected, int64_t prototypes, int64_t heads, int64_t d, float *keys,
                                  const float *head_scale, const float *share, const float *slope, const float *middle,
                                  const float *threshold, uint32_t *bits) {
    const int64_t padded = (prototypes + 15) / 16 * 16, width = heads * d;
    memset(keys, 0, (size_t)(images * width * padded) * sizeof(float));
    for (int64_t image = 0; image < images; ++image)
        for (int64_t m = 0; m < prototypes; ++m)
            for (int64_t head = 0; head < heads; ++head) {
                const float *key = projected + (image * prototypes + m) * 2 * width + head * d;
                float squares = 0;
                for (int64_t j = 0; j < d; ++j) squares += key[j] * key[j];
                const float norm = fmaxf(sqrtf(squares), SMALLEST_NORM);
                for (int64_t j = 0; j < d; ++j) keys[((image * heads + head) * d + j) * padded + m] = key[j] / norm;
            }
    const Attention a = {tokens, prototypes, padded, heads,      d,     keys,
                         projected + width, 2 * width,  head_scale, share, slope, middle};
    const int64_t count = images * ((tokens + ATTENTION_ROWS - 1) / ATTENTION_ROWS);
    FOR_BLOCKS(count, 2, PATHS[isa].attend_blocks(&a, query, first, last, threshold, bits))
}

static void attend_linear(int isa, int threads, const LinearAttention *a, int64_t images) {
    { FOR_BLOCKS(images * a->heads, 1, PATHS[isa].summarise(a, first); (void)last) }
    const int64_t count = images * ((a->tokens + ATTENTION_ROWS - 1) / ATTENTION_ROWS);
    FOR_BLOCKS(count, 1, PATHS[isa].attend_linear_blocks(a, first, last))
}

/* projected (images * tokens, 3 * heads * d): queries, keys, values -> linear attention, (images * tokens, heads * d): floats
 * `out` if `threshold` is null, else bits at `threshold` (heads * d). At most 4096 channels (up to 3 x 16 rows live on the stack).
 * `summaries` is scratch of images * heads * (d + 1) * d floats.
 */
void binaryad_linear_attention(int isa, int threads, const float *projected, int64_t images, int64_t tokens, int64_t heads,
                               int64_t d, float *summaries, const float *threshold, uint32_t *bits, float *out) {
    const LinearAttention a = {tokens, heads, d, projected, 0, 0, 0, 0, summaries, threshold, bits, out};
    attend_linear(isa, threads, &a, images);
}

/* Bits of linear attention, whose queries, keys and values a binary layer makes from the bits of the input (images * tokens,
 * heads * d), as `binaryad_linear` followed by `binaryad_linear_attention`. d must be a multiple of 32.
 */
void binaryad_project_and_attend(int isa, int threads, const uint32_t *input, const uint32_t *panels, const float *scale,
                                 const float *bias, int64_t images, int64_t tokens, int64_t heads, int64_t d,
                                 float *summaries, const float *threshold, uint32_t *bits) {
    const LinearAttention a = {tokens, heads, d, 0, input, panels, scale, bias, summaries, threshold, bits, 0};
    attend_linear(isa, threads, &a, images);
}

/* Bits of the attention (rows, width) -> x = scale (width - 2 mismatches) + bias (+ residual), then x + fc2(fc1(bits of layer
 * norm of x)) as `binaryad_linear`, `binaryad_layer_norm_pack` and `binaryad_linear_to_bits` compute them, into out (rows, width).
 */
void binaryad_project_and_transform(int isa, int threads, const uint32_t *bits, int64_t rows, int64_t width, int64_t hidden,
                                    const uint32_t *proj_panels, const float *proj_scale, const float *proj_bias,
                                    const float *residual, const float *norm_weight, const float *norm_bias, float eps,
                                    const float *threshold, const uint32_t *fc1_panels, const int32_t *low,
                                    const int32_t *span, const uint32_t *fc2_panels, const float *fc2_scale,
                                    const float *fc2_bias, float *out) {
    const BlockTail tail = {width,     hidden, bits,       proj_panels, proj_scale, proj_bias,  residual,  norm_weight, norm_bias,
                            threshold, eps,    fc1_panels, low,         span,       fc2_panels, fc2_scale, fc2_bias,    out};
    FOR_BLOCKS(rows, ROW_BLOCK, PATHS[isa].project_and_transform(&tail, first, last))
}

/* ------------------------------------------------------------------ between 8-bit products -------------------------- */

/* x (rows, n) -> bytes 128 + round(x / scale) and scales (rows). */
void binaryad_quantize(int isa, int threads, const float *x, int64_t rows, int64_t n, uint8_t *out, float *scales) {
    FOR_BLOCKS(rows, ROW_BLOCK, PATHS[isa].quantize_rows(x, first, last, n, out, scales))
}

/* The same of layer_norm(x). */
void binaryad_layer_norm_quantize(int isa, int threads, const float *x, int64_t rows, int64_t n, const float *weight,
                                  const float *bias, float eps, uint8_t *out, float *scales) {
    FOR_BLOCKS(rows, ROW_BLOCK, PATHS[isa].layer_norm_quantize_rows(x, first, last, n, weight, bias, eps, out, scales))
}

/* The same of gelu(sums * row_scales + bias). */
void binaryad_gelu_quantize(int isa, int threads, const float *sums, int64_t rows, int64_t n, const float *row_scales,
                            const float *bias, uint8_t *out, float *scales) {
    FOR_BLOCKS(rows, ROW_BLOCK, PATHS[isa].gelu_quantize_rows(sums, first, last, n, row_scales, bias, out, scales))
}

/* out = residual + layer_scale (sums * row_scales + bias), (rows, n); layer_scale (n) and residual may be null. */
void binaryad_rescale(int isa, int threads, const float *sums, int64_t rows, int64_t n, const float *row_scales,
                      const float *bias, const float *layer_scale, const float *residual, float *out) {
    FOR_BLOCKS(rows, ROW_BLOCK,
               PATHS[isa].rescale_rows(sums, first, last, n, row_scales, bias, layer_scale, residual, out))
}

/* Whether `binaryad_softmax_attention` runs on this machine. */
int binaryad_has_softmax_attention(void) {
#if BFLOAT16
    __builtin_cpu_init();
    return binaryad_best_isa() == ISA_AVX512 && __builtin_cpu_supports("avx512bf16");
#else
    return 0;
#endif
}

/* projected (images * tokens, 3 * heads * d): queries, keys and values as sums * row_scales + bias -> out (images * tokens,
 * heads * d), the softmax attention. d must be a multiple of 32. Returns 0 if there is no memory for it, else 1.
 */
int binaryad_softmax_attention(int isa, int threads, const float *projected, int64_t images, int64_t tokens, int64_t heads,
                               int64_t d, const float *row_scales, const float *bias, float *out) {
    (void)isa;
    int done = 0;
#if BFLOAT16
    const int64_t padded = (tokens + KEY_BLOCK - 1) / KEY_BLOCK * KEY_BLOCK;
    int64_t failures = 0;
    const SoftmaxAttention a = {tokens, padded, heads, d, projected, row_scales, bias, out, &failures};
    FOR_BLOCKS(images * heads, 1, attend_softmax(&a, first); (void)last)
    done = failures == 0;
#else
    (void)threads, (void)projected, (void)images, (void)tokens, (void)heads, (void)d, (void)row_scales, (void)bias, (void)out;
#endif
    return done;
}
