/* Written once, compiled once per instruction set: kernels.c includes this file for each path with PATH_AVX512, PATH_AVX2,
 * PATH_NEON or PATH_SCALAR set to 1 and NAME(x) adding the path's suffix. No include guard, on purpose.
 *
 * Vector code uses the compiler's vector extension (GCC, clang): a V holds LANES floats. Only bit
 * counting and comparing into bits need intrinsics.
 */

/* ------------------------------------------------------------------ vectors ---------------------------------------- */

#if PATH_AVX512
#define LANES 16
#elif PATH_AVX2
#define LANES 8
#else
#define LANES 4
#endif

typedef float NAME(V) __attribute__((vector_size(4 * LANES)));
typedef float NAME(Unaligned) __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t NAME(I) __attribute__((vector_size(4 * LANES)));
/* few prototypes share a vector */
#define KEY_LANES (LANES < 8 ? LANES : 8)
typedef float NAME(K) __attribute__((vector_size(4 * KEY_LANES)));
typedef float NAME(UnalignedK) __attribute__((vector_size(4 * KEY_LANES), aligned(4), may_alias));
#define V NAME(V)
#define I NAME(I)

INLINE V NAME(load)(const float *values) { return *(const NAME(Unaligned) *)values; }

INLINE void NAME(store)(float *target, V values) { *(NAME(Unaligned) *)target = values; }

INLINE V NAME(splat)(float value) { return value - (V){0}; }

/* The first `count` (at most LANES) values, then zeros. */
INLINE V NAME(load_part)(const float *values, int64_t count) {
    float buffer[LANES] = {0};
    memcpy(buffer, values, (size_t)count * sizeof(float));
    return NAME(load)(buffer);
}

INLINE float NAME(sum)(V v) {
#if PATH_AVX512
    return _mm512_reduce_add_ps((__m512)v);
#else
    float buffer[LANES], total = 0;
    NAME(store)(buffer, v);
    for (int lane = 0; lane < LANES; ++lane) total += buffer[lane];
    return total;
#endif
}

INLINE V NAME(choose)(I condition, V yes, V no) { return (V)(((I)yes & condition) | ((I)no & ~condition)); }

/* The larger of two, NaN if either is. */
INLINE V NAME(maximum)(V a, V b) { return NAME(choose)((a > b) | (a != a), a, b); }

/* exp, x clamped to [-87, 87]; relative error below 3e-7 (polynomial of degree 6 on [-ln2/2, ln2/2]). */
INLINE V NAME(exponential)(V x) {
    x = NAME(choose)(x < -87.0f, NAME(splat)(-87.0f), NAME(choose)(x > 87.0f, NAME(splat)(87.0f), x));
    const V magic = NAME(splat)(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    const V whole = (x * 1.44269504088896341f + magic) - magic;
    const V rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    V p = NAME(splat)(1.0f / 720.0f);
    p = p * rest + 1.0f / 120.0f;
    p = p * rest + 1.0f / 24.0f;
    p = p * rest + 1.0f / 6.0f;
    p = p * rest + 0.5f;
    p = p * rest + 1.0f;
    p = p * rest + 1.0f;
    return p * (V)((__builtin_convertvector(whole, I) + 127) << 23);
}

INLINE float NAME(dot)(const float *a, const float *b, int64_t count) {
    V products = {0};
    int64_t j = 0;
    for (; j + LANES <= count; j += LANES) products += NAME(load)(a + j) * NAME(load)(b + j);
    float total = NAME(sum)(products);
    for (; j < count; ++j) total += a[j] * b[j];
    return total;
}

/* Mean and 1 / sqrt(variance + eps) of one row. */
INLINE void NAME(row_moments)(const float *row, int64_t k, float eps, float *mean, float *inverse_deviation) {
    V parts[4] = {{0}, {0}, {0}, {0}}; /* four, so that no addition waits for the one before */
    int64_t i = 0;
    for (; i + 4 * LANES <= k; i += 4 * LANES)
        for (int part = 0; part < 4; ++part) parts[part] += NAME(load)(row + i + part * LANES);
    float total = NAME(sum)((parts[0] + parts[1]) + (parts[2] + parts[3]));
    for (; i < k; ++i) total += row[i];
    *mean = total / (float)k;
    parts[0] = parts[1] = parts[2] = parts[3] = (V){0};
    for (i = 0; i + 4 * LANES <= k; i += 4 * LANES)
        for (int part = 0; part < 4; ++part) {
            const V difference = NAME(load)(row + i + part * LANES) - *mean;
            parts[part] += difference * difference;
        }
    total = NAME(sum)((parts[0] + parts[1]) + (parts[2] + parts[3]));
    for (; i < k; ++i) total += (row[i] - *mean) * (row[i] - *mean);
    *inverse_deviation = 1.0f / sqrtf(total / (float)k + eps);
}

/* ------------------------------------------------------------------ pack ------------------------------------------- */

/* Bit j of the result: values[j] - thresholds[j] >= 0, for j < count <= 32. */
INLINE uint32_t NAME(compare)(const float *values, const float *thresholds, int64_t count) {
    uint32_t word = 0;
    for (int64_t j = 0; j < count; ++j) word |= (uint32_t)(values[j] - thresholds[j] >= 0) << j;
    return word;
}

INLINE uint32_t NAME(compare32)(const float *values, const float *thresholds) {
#if PATH_AVX512
    const __m512 low = _mm512_sub_ps(_mm512_loadu_ps(values), _mm512_loadu_ps(thresholds));
    const __m512 high = _mm512_sub_ps(_mm512_loadu_ps(values + 16), _mm512_loadu_ps(thresholds + 16));
    const uint32_t first = _mm512_cmp_ps_mask(low, _mm512_setzero_ps(), _CMP_GE_OQ);
    return first | (uint32_t)_mm512_cmp_ps_mask(high, _mm512_setzero_ps(), _CMP_GE_OQ) << 16;
#elif PATH_AVX2
    uint32_t word = 0;
    for (int part = 0; part < 4; ++part) {
        const __m256 difference = _mm256_sub_ps(_mm256_loadu_ps(values + 8 * part), _mm256_loadu_ps(thresholds + 8 * part));
        const __m256 chosen = _mm256_cmp_ps(difference, _mm256_setzero_ps(), _CMP_GE_OQ);
        word |= (uint32_t)_mm256_movemask_ps(chosen) << (8 * part);
    }
    return word;
#else
    return NAME(compare)(values, thresholds, 32);
#endif
}

INLINE void NAME(pack_row)(const float *row, int64_t k, const float *threshold, uint32_t *bits) {
    const int64_t words = words_of(k);
    for (int64_t word = 0; word < words; ++word) {
        const int64_t left = k - 32 * word;
        if (left >= 32) bits[word] = NAME(compare32)(row + 32 * word, threshold + 32 * word);
        else bits[word] = left > 0 ? NAME(compare)(row + 32 * word, threshold + 32 * word, left) : 0;
    }
}

/* Layer norm of one row, 32 columns at a time, straight into bits. */
INLINE void NAME(layer_norm_pack_row)(const float *row, int64_t k, const float *weight, const float *bias, float eps,
                                      const float *threshold, uint32_t *bits) {
    float mean, inverse, buffer[32];
    NAME(row_moments)(row, k, eps, &mean, &inverse);
    const int64_t words = words_of(k);
    for (int64_t word = 0; word < words; ++word) {
        const int64_t start = 32 * word, left = k - start;
        if (left >= 32) {
            for (int j = 0; j < 32; j += LANES) {
                const V normal = (NAME(load)(row + start + j) - mean) * inverse;
                NAME(store)(buffer + j, normal * NAME(load)(weight + start + j) + NAME(load)(bias + start + j));
            }
            bits[word] = NAME(compare32)(buffer, threshold + start);
        } else {
            for (int64_t j = 0; j < left; ++j)
                buffer[j] = (row[start + j] - mean) * inverse * weight[start + j] + bias[start + j];
            bits[word] = left > 0 ? NAME(compare)(buffer, threshold + start, left) : 0;
        }
    }
}

static void NAME(pack_rows)(const float *x, int64_t first, int64_t last, int64_t k, const float *threshold, uint32_t *bits) {
    for (int64_t row = first; row < last; ++row) NAME(pack_row)(x + row * k, k, threshold, bits + row * words_of(k));
}

static void NAME(layer_norm_pack_rows)(const float *x, int64_t first, int64_t last, int64_t k, const float *weight,
                                       const float *bias, float eps, const float *threshold, uint32_t *bits) {
    for (int64_t row = first; row < last; ++row)
        NAME(layer_norm_pack_row)(x + row * k, k, weight, bias, eps, threshold, bits + row * words_of(k));
}

/* ------------------------------------------------------------------ multiply --------------------------------------- */

INLINE void NAME(finish)(const Product *product, int64_t row, int64_t panel, const uint32_t *mismatches) {
    const int64_t column = panel * PANEL;
    const int64_t count = product->n - column < PANEL ? product->n - column : PANEL;
    if (product->out_bits) {
        uint32_t word = 0;
        for (int64_t j = 0; j < count; ++j)
            word |= (uint32_t)(mismatches[j] - (uint32_t)product->low[column + j] > (uint32_t)product->span[column + j]) << j;
        product->out_bits[row * words_of(product->n) + panel] = word;
        return;
    }
    for (int64_t j = 0; j < count; ++j) {
        const int64_t place = row * product->n + column + j;
        const float sum = (float)((int32_t)product->k - 2 * (int32_t)mismatches[j]);
        const float value = sum * product->scale[column + j] + product->bias[column + j];
        product->out[place] = product->residual ? value + product->residual[place] : value;
    }
}

#if !PATH_AVX512 && !PATH_AVX2 && !PATH_NEON

static void NAME(multiply)(const Product *product, const uint32_t *bits, const uint32_t *panels, int64_t first, int64_t last) {
    const int64_t count = (product->n + PANEL - 1) / PANEL;
    for (int64_t panel = 0; panel < count; ++panel) {
        const uint32_t *weights = panels + panel * product->words * PANEL;
        for (int64_t row = first; row < last; ++row) {
            uint32_t mismatches[PANEL] = {0};
            const uint32_t *activations = bits + row * product->words;
            for (int64_t word = 0; word < product->words; ++word)
                for (int j = 0; j < PANEL; ++j)
                    mismatches[j] += count_bits(activations[word] ^ weights[word * PANEL + j]);
            NAME(finish)(product, row, panel, mismatches);
        }
    }
}

#elif PATH_AVX512

INLINE void NAME(finish_vectors)(const Product *product, int64_t row, int64_t panel, __m512i low, __m512i high) {
    const int64_t column = panel * PANEL;
    if (column + PANEL > product->n) {
        uint32_t mismatches[PANEL];
        _mm512_storeu_si512(mismatches, low);
        _mm512_storeu_si512(mismatches + 16, high);
        NAME(finish)(product, row, panel, mismatches);
        return;
    }
    if (product->out_bits) {
        const __m512i low_1 = _mm512_loadu_si512(product->low + column), low_2 = _mm512_loadu_si512(product->low + column + 16);
        const __m512i span_1 = _mm512_loadu_si512(product->span + column);
        const __m512i span_2 = _mm512_loadu_si512(product->span + column + 16);
        const uint32_t first = _mm512_cmpgt_epu32_mask(_mm512_sub_epi32(low, low_1), span_1);
        const uint32_t second = _mm512_cmpgt_epu32_mask(_mm512_sub_epi32(high, low_2), span_2);
        product->out_bits[row * words_of(product->n) + panel] = first | second << 16;
        return;
    }
    const __m512i k = _mm512_set1_epi32((int32_t)product->k);
    float *out = product->out + row * product->n + column;
    for (int half = 0; half < 2; ++half) {
        const __m512 sum = _mm512_cvtepi32_ps(_mm512_sub_epi32(k, _mm512_slli_epi32(half ? high : low, 1)));
        const __m512 scale = _mm512_loadu_ps(product->scale + column + 16 * half);
        __m512 value = _mm512_add_ps(_mm512_mul_ps(sum, scale), _mm512_loadu_ps(product->bias + column + 16 * half));
        if (product->residual)
            value = _mm512_add_ps(value, _mm512_loadu_ps(product->residual + row * product->n + column + 16 * half));
        _mm512_storeu_ps(out + 16 * half, value);
    }
}

/* `rows` rows by 32 columns; with a constant `rows` the counts stay in registers. */
INLINE void NAME(tile)(const Product *product, const uint32_t *bits, const uint32_t *weights, int64_t row,
                       int64_t panel, const int rows) {
    __m512i low[8], high[8];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) low[r] = high[r] = _mm512_setzero_si512();
    const uint32_t *activations = bits + row * product->words;
    for (int64_t word = 0; word < product->words; ++word) {
        const __m512i first = _mm512_loadu_si512(weights + word * PANEL);
        const __m512i second = _mm512_loadu_si512(weights + word * PANEL + 16);
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
            const __m512i activation = _mm512_set1_epi32((int32_t)activations[r * product->words + word]);
            low[r] = _mm512_add_epi32(low[r], _mm512_popcnt_epi32(_mm512_xor_si512(first, activation)));
            high[r] = _mm512_add_epi32(high[r], _mm512_popcnt_epi32(_mm512_xor_si512(second, activation)));
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) NAME(finish_vectors)(product, row + r, panel, low[r], high[r]);
}

static void NAME(multiply)(const Product *product, const uint32_t *bits, const uint32_t *panels, int64_t first,
                           int64_t last) {
    const int64_t count = (product->n + PANEL - 1) / PANEL;
    for (int64_t panel = 0; panel < count; ++panel) {
        const uint32_t *weights = panels + panel * product->words * PANEL;
        int64_t row = first;
        for (; row + 8 <= last; row += 8) NAME(tile)(product, bits, weights, row, panel, 8);
        for (; row + 2 <= last; row += 2) NAME(tile)(product, bits, weights, row, panel, 2);
        for (; row < last; ++row) NAME(tile)(product, bits, weights, row, panel, 1);
    }
}

#elif PATH_AVX2

INLINE void NAME(tile)(const Product *product, const uint32_t *bits, const uint32_t *weights, int64_t row,
                       int64_t panel, const int rows) {
    const __m256i nibble = _mm256_set1_epi8(15);
    const __m256i counts = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4, 0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3,
                                            2, 3, 3, 4);
    uint32_t mismatches[2][PANEL] = {{0}};
    const uint32_t *activations = bits + row * product->words;
    for (int64_t start = 0; start < product->words; start += WORDS_PER_BYTE_COUNTER) {
        const int64_t end = start + WORDS_PER_BYTE_COUNTER < product->words ? start + WORDS_PER_BYTE_COUNTER : product->words;
        __m256i bytes[2][4];
#pragma GCC unroll 2
        for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
            for (int part = 0; part < 4; ++part) bytes[r][part] = _mm256_setzero_si256();
        for (int64_t word = start; word < end; ++word) {
#pragma GCC unroll 2
            for (int r = 0; r < rows; ++r) {
                const __m256i activation = _mm256_set1_epi32((int32_t)activations[r * product->words + word]);
#pragma GCC unroll 4
                for (int part = 0; part < 4; ++part) {
                    const __m256i weight = _mm256_loadu_si256((const __m256i *)(weights + word * PANEL + 8 * part));
                    const __m256i different = _mm256_xor_si256(weight, activation);
                    const __m256i low = _mm256_and_si256(different, nibble);
                    const __m256i high = _mm256_and_si256(_mm256_srli_epi32(different, 4), nibble);
                    const __m256i count = _mm256_add_epi8(_mm256_shuffle_epi8(counts, low), _mm256_shuffle_epi8(counts, high));
                    bytes[r][part] = _mm256_add_epi8(bytes[r][part], count);
                }
            }
        }
        for (int r = 0; r < rows; ++r)
            for (int part = 0; part < 4; ++part) {
                const __m256i pairs = _mm256_maddubs_epi16(bytes[r][part], _mm256_set1_epi8(1));
                const __m256i sums = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
                __m256i *target = (__m256i *)(mismatches[r] + 8 * part);
                _mm256_storeu_si256(target, _mm256_add_epi32(_mm256_loadu_si256(target), sums));
            }
    }
    for (int r = 0; r < rows; ++r) NAME(finish)(product, row + r, panel, mismatches[r]);
}

static void NAME(multiply)(const Product *product, const uint32_t *bits, const uint32_t *panels, int64_t first,
                           int64_t last) {
    const int64_t count = (product->n + PANEL - 1) / PANEL;
    for (int64_t panel = 0; panel < count; ++panel) {
        const uint32_t *weights = panels + panel * product->words * PANEL;
        int64_t row = first;
        for (; row + 2 <= last; row += 2) NAME(tile)(product, bits, weights, row, panel, 2);
        for (; row < last; ++row) NAME(tile)(product, bits, weights, row, panel, 1);
    }
}

#elif PATH_NEON

static void NAME(multiply)(const Product *product, const uint32_t *bits, const uint32_t *panels, int64_t first, int64_t last) {
    const int64_t count = (product->n + PANEL - 1) / PANEL;
    for (int64_t panel = 0; panel < count; ++panel) {
        const uint32_t *weights = panels + panel * product->words * PANEL;
        for (int64_t row = first; row < last; ++row) {
            const uint32_t *activations = bits + row * product->words;
            uint32_t mismatches[PANEL] = {0};
            for (int64_t start = 0; start < product->words; start += WORDS_PER_BYTE_COUNTER) {
                const int64_t stop = start + WORDS_PER_BYTE_COUNTER;
                const int64_t end = stop < product->words ? stop : product->words;
                uint8x16_t bytes[8];
                for (int part = 0; part < 8; ++part) bytes[part] = vdupq_n_u8(0);
                for (int64_t word = start; word < end; ++word) {
                    const uint32x4_t activation = vdupq_n_u32(activations[word]);
#pragma GCC unroll 8
                    for (int part = 0; part < 8; ++part) {
                        const uint32x4_t weight = vld1q_u32(weights + word * PANEL + 4 * part);
                        const uint8x16_t different = vreinterpretq_u8_u32(veorq_u32(weight, activation));
                        bytes[part] = vaddq_u8(bytes[part], vcntq_u8(different));
                    }
                }
                for (int part = 0; part < 8; ++part) {
                    uint32_t *target = mismatches + 4 * part;
                    vst1q_u32(target, vaddq_u32(vld1q_u32(target), vpaddlq_u16(vpaddlq_u8(bytes[part]))));
                }
            }
            NAME(finish)(product, row, panel, mismatches);
        }
    }
}

#endif

/* ------------------------------------------------------------------ prototype attention ---------------------------- */

/* The map of LANES tokens, a lane each, over the prototypes: relu(s cosine), then softmax-aware binarization. */
INLINE void NAME(attention_map)(const Attention *a, int64_t head, V inverse_norm, float (*map)[ATTENTION_ROWS]) {
    const float scale = a->head_scale[head];
    const V zero = {0}, one = NAME(splat)(1);
    V maximum = zero;
    for (int64_t m = 0; m < a->prototypes; ++m) {
        const V entry = NAME(maximum)(NAME(load)(map[m]) * inverse_norm * scale, zero);
        maximum = NAME(maximum)(entry, maximum);
        NAME(store)(map[m], entry);
    }
    if (!a->share) return;
    const V threshold = maximum * a->share[head];
    V sum = zero, chosen = zero;
    for (int64_t m = 0; m < a->prototypes; ++m) {
        const V entry = NAME(load)(map[m]);
        const I binary = (entry >= threshold) & (maximum > 0);
        sum += NAME(choose)(binary, entry, zero);
        chosen += NAME(choose)(binary, one, zero);
    }
    const V row_scale = sum / NAME(maximum)(chosen, one);
    V gate = one;
    if (a->slope) {
        const float magnitude = fabsf(scale) > SMALLEST_SCALE ? fabsf(scale) : SMALLEST_SCALE;
        gate = 1.0f / (1.0f + NAME(exponential)(-(a->slope[head] * (maximum / magnitude - a->middle[head]))));
    }
    for (int64_t m = 0; m < a->prototypes; ++m) {
        const V entry = NAME(load)(map[m]);
        const I binary = (entry >= threshold) & (maximum > 0);
        NAME(store)(map[m], (1.0f - gate) * entry + gate * row_scale * NAME(choose)(binary, one, zero));
    }
}

/* dots[m][row] = q . key m for four neighbouring rows; lanes are prototypes. */
INLINE void NAME(compare_with_keys)(const Attention *a, const float *queries, int64_t width, int64_t first, int64_t count,
                                    const float *keys, float (*dots)[ATTENTION_ROWS]) {
    const float *q[4]; /* beyond the last row the last one again: its results go where nobody looks */
    for (int row = 0; row < 4; ++row) q[row] = queries + (first + row < count ? first + row : count - 1) * width;
    for (int64_t start = 0; start < a->prototypes; start += KEY_LANES) {
        NAME(K) sums[4] = {{0}, {0}, {0}, {0}};
        for (int64_t j = 0; j < a->d; ++j) {
            const NAME(K) key = *(const NAME(UnalignedK) *)(keys + j * a->padded + start);
            for (int row = 0; row < 4; ++row) sums[row] += q[row][j] * key;
        }
        for (int row = 0; row < 4; ++row) {
            float buffer[KEY_LANES];
            *(NAME(UnalignedK) *)buffer = sums[row];
            for (int64_t m = start; m < a->prototypes && m < start + KEY_LANES; ++m) dots[m][first + row] = buffer[m - start];
        }
    }
}

/* Up to ATTENTION_ROWS tokens of one image, all heads; out (count, heads * d). */
INLINE void NAME(attend_rows)(const Attention *a, const float *query, int64_t image, int64_t count, float *out) {
    const int64_t width = a->heads * a->d;
    float map[MOST_PROTOTYPES][ATTENTION_ROWS] = {{0}}, norms[ATTENTION_ROWS] = {0};
    for (int64_t head = 0; head < a->heads; ++head) {
        const float *keys = a->keys + (image * a->heads + head) * a->d * a->padded;
        const float *values = a->values + image * a->prototypes * a->value_stride + head * a->d;
        const float *queries = query + head * a->d;
        for (int64_t row = 0; row < count; ++row) {
            const float *row_query = queries + row * width;
            norms[row] = sqrtf(NAME(dot)(row_query, row_query, a->d));
        }
        for (int64_t row = 0; row < count; row += 4)
            NAME(compare_with_keys)(a, queries, width, row, count, keys, map);
        for (int row = 0; row < ATTENTION_ROWS; row += LANES) {
            const V norm = NAME(maximum)(NAME(load)(norms + row), NAME(splat)(SMALLEST_NORM));
            NAME(attention_map)(a, head, 1.0f / norm, (float(*)[ATTENTION_ROWS])(&map[0][row]));
        }
        for (int64_t row = 0; row < count; ++row) {
            float *target = out + row * width + head * a->d;
            int64_t j = 0;
            for (; j + LANES <= a->d; j += LANES) {
                V sum = {0};
                for (int64_t m = 0; m < a->prototypes; ++m) sum += map[m][row] * NAME(load)(values + m * a->value_stride + j);
                NAME(store)(target + j, sum);
            }
            for (; j < a->d; ++j) {
                float sum = 0;
                for (int64_t m = 0; m < a->prototypes; ++m) sum += map[m][row] * values[m * a->value_stride + j];
                target[j] = sum;
            }
        }
    }
}

/* Blocks of ATTENTION_ROWS tokens never cross an image. */
static void NAME(attend_blocks)(const Attention *a, const float *query, int64_t first, int64_t last, const float *threshold,
                                uint32_t *bits) {
    const int64_t width = a->heads * a->d, per_image = (a->tokens + ATTENTION_ROWS - 1) / ATTENTION_ROWS;
    float out[ATTENTION_ROWS * width];
    for (int64_t block = first; block < last; ++block) {
        const int64_t image = block / per_image, start = block % per_image * ATTENTION_ROWS;
        const int64_t count = a->tokens - start < ATTENTION_ROWS ? a->tokens - start : ATTENTION_ROWS;
        const int64_t row = image * a->tokens + start;
        NAME(attend_rows)(a, query + row * width, image, count, out);
        for (int64_t r = 0; r < count; ++r)
            NAME(pack_row)(out + r * width, width, threshold, bits + (row + r) * words_of(width));
    }
}

#include "linear_attention.h"
#include "block.h"
#include "int8.h"

#undef V
#undef I
#undef LANES
#undef KEY_LANES
