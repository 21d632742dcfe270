/* Softmax attention of the encoder with bfloat16 products and float32 sums (AVX-512 BF16). One task is one head of one image.
 *
 * Keys lie as [16 keys][pair of channels][key][2], values as [pair of keys][channel][2], both padded with zeros to 32 keys,
 * so that each dot-product instruction serves 16 keys, or 16 channels.
 */

enum { ATTENTION_TILE = 8, KEY_BLOCK = 32 };

typedef struct {
    int64_t tokens, padded, heads, d;
    const float *projected, *row_scales, *bias; /* queries, keys, values: projected * row scale + bias, (images * tokens, 3C) */
    float *out;                                 /* (images * tokens, C) */
    int64_t *failures;                          /* counts tasks that got no memory */
} SoftmaxAttention;

INLINE __m512 projected16(const SoftmaxAttention *a, int64_t row, int64_t column) {
    const __m512 sums = _mm512_loadu_ps(a->projected + row * 3 * a->heads * a->d + column);
    return _mm512_fmadd_ps(sums, _mm512_set1_ps(a->row_scales[row]), _mm512_loadu_ps(a->bias + column));
}

INLINE __m512i bfloat16_low_half(__m512 values) {
    return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(values));
}

static void lay_out_keys_and_values(const SoftmaxAttention *a, int64_t image, int64_t head, uint32_t *keys, uint32_t *values) {
    const int64_t width = a->heads * a->d, pairs = a->d / 2;
    memset(keys, 0, (size_t)(a->padded * pairs) * sizeof(uint32_t));
    memset(values, 0, (size_t)(a->padded * pairs) * sizeof(uint32_t));
    for (int64_t n = 0; n < a->tokens; ++n) {
        const int64_t row = image * a->tokens + n;
        uint32_t *target = keys + n / 16 * pairs * 16 + n % 16;
        for (int64_t j = 0; j < a->d; j += 16) {
            const __m256i half = (__m256i)_mm512_cvtneps_pbh(projected16(a, row, width + head * a->d + j));
            uint32_t buffer[8];
            _mm256_storeu_si256((__m256i *)buffer, half);
            for (int pair = 0; pair < 8; ++pair) target[(j / 2 + pair) * 16] = buffer[pair];
        }
    }
    for (int64_t n = 0; n < a->tokens; n += 2) {
        const int64_t row = image * a->tokens + n;
        for (int64_t j = 0; j < a->d; j += 16) {
            const int64_t column = 2 * width + head * a->d + j;
            const __m512i first = bfloat16_low_half(projected16(a, row, column));
            __m512i second = _mm512_setzero_si512();
            if (n + 1 < a->tokens) second = _mm512_slli_epi32(bfloat16_low_half(projected16(a, row + 1, column)), 16);
            _mm512_storeu_si512(values + n / 2 * a->d + j, _mm512_or_si512(first, second));
        }
    }
}

/* 2^x for x <= 0; relative error below 3e-6, far below that of the bfloat16 it becomes. */
INLINE __m512 power_of_two(__m512 x) {
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 rest = _mm512_sub_ps(x, whole);
    __m512 p = _mm512_set1_ps(1.3333558e-3f);
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(9.6181291e-3f));
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(5.5504109e-2f));
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(2.4022651e-1f));
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(6.9314718e-1f));
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, whole);
}

/* Scores of one row -> unnormalised probabilities, as bfloat16 in the same place; returns the inverse of their sum. */
INLINE float softmax_in_place(float *scores, int64_t tokens, int64_t padded) {
    for (int64_t n = tokens; n < padded; ++n) scores[n] = -INFINITY;
    __m512 largest = _mm512_loadu_ps(scores), sum = _mm512_setzero_ps();
    for (int64_t n = 16; n < padded; n += 16) largest = _mm512_max_ps(largest, _mm512_loadu_ps(scores + n));
    const __m512 maximum = _mm512_set1_ps(_mm512_reduce_max_ps(largest));
    for (int64_t n = 0; n < padded; n += 16) {
        const __m512 x = _mm512_max_ps(_mm512_sub_ps(_mm512_loadu_ps(scores + n), maximum), _mm512_set1_ps(-200.0f));
        const __m512 p = power_of_two(x);
        sum = _mm512_add_ps(sum, p);
        _mm256_storeu_si256((__m256i *)((uint16_t *)scores + n), (__m256i)_mm512_cvtneps_pbh(p));
    }
    return 1.0f / _mm512_reduce_add_ps(sum); /* what a padded key adds, 2^-200, is nothing in float32 */
}

static void attend_softmax(const SoftmaxAttention *a, int64_t task) {
    const int64_t image = task / a->heads, head = task % a->heads, width = a->heads * a->d, pairs = a->d / 2;
    uint32_t *keys = aligned_alloc(64, (size_t)(2 * a->padded * pairs) * sizeof(uint32_t));
    float *scores = aligned_alloc(64, (size_t)(ATTENTION_TILE * a->padded) * sizeof(float));
    if (!keys || !scores) {
        free(scores);
        free(keys);
        __atomic_add_fetch(a->failures, 1, __ATOMIC_RELAXED);
        return;
    }
    uint32_t *values = keys + a->padded * pairs;
    uint32_t queries[ATTENTION_TILE * pairs];
    float inverse_sum[ATTENTION_TILE];
    const __m512 scale = _mm512_set1_ps(1.44269504088896341f / sqrtf((float)a->d)); /* softmax by powers of two */
    lay_out_keys_and_values(a, image, head, keys, values);
    for (int64_t start = 0; start < a->tokens; start += ATTENTION_TILE) {
        const int64_t count = a->tokens - start < ATTENTION_TILE ? a->tokens - start : ATTENTION_TILE;
        for (int64_t r = 0; r < ATTENTION_TILE; ++r) { /* beyond the last row the last one again */
            const int64_t row = image * a->tokens + start + (r < count ? r : count - 1);
            for (int64_t j = 0; j < a->d; j += 16) {
                const __m512 query = _mm512_mul_ps(projected16(a, row, head * a->d + j), scale);
                _mm256_storeu_si256((__m256i *)(queries + r * pairs + j / 2), (__m256i)_mm512_cvtneps_pbh(query));
            }
        }
        for (int64_t block = 0; block < a->padded; block += KEY_BLOCK) {
            __m512 first[ATTENTION_TILE], second[ATTENTION_TILE];
            for (int r = 0; r < ATTENTION_TILE; ++r) first[r] = second[r] = _mm512_setzero_ps();
            const uint32_t *low = keys + block * pairs, *high = low + 16 * pairs;
            for (int64_t pair = 0; pair < pairs; ++pair) {
                const __m512bh key_1 = (__m512bh)_mm512_loadu_si512(low + 16 * pair);
                const __m512bh key_2 = (__m512bh)_mm512_loadu_si512(high + 16 * pair);
#pragma GCC unroll 8
                for (int r = 0; r < ATTENTION_TILE; ++r) {
                    const __m512bh query = (__m512bh)_mm512_set1_epi32((int32_t)queries[r * pairs + pair]);
                    first[r] = _mm512_dpbf16_ps(first[r], key_1, query);
                    second[r] = _mm512_dpbf16_ps(second[r], key_2, query);
                }
            }
            for (int r = 0; r < ATTENTION_TILE; ++r) {
                _mm512_storeu_ps(scores + r * a->padded + block, first[r]);
                _mm512_storeu_ps(scores + r * a->padded + block + 16, second[r]);
            }
        }
        for (int r = 0; r < ATTENTION_TILE; ++r)
            inverse_sum[r] = softmax_in_place(scores + r * a->padded, a->tokens, a->padded);
        for (int64_t j = 0; j < a->d; j += 32) {
            __m512 first[ATTENTION_TILE], second[ATTENTION_TILE];
            for (int r = 0; r < ATTENTION_TILE; ++r) first[r] = second[r] = _mm512_setzero_ps();
            for (int64_t pair = 0; pair < a->padded / 2; ++pair) {
                const __m512bh value_1 = (__m512bh)_mm512_loadu_si512(values + pair * a->d + j);
                const __m512bh value_2 = (__m512bh)_mm512_loadu_si512(values + pair * a->d + j + 16);
#pragma GCC unroll 8
                for (int r = 0; r < ATTENTION_TILE; ++r) {
                    uint32_t two;
                    memcpy(&two, scores + r * a->padded + pair, sizeof(two)); /* two bfloat16 in the room of one float */
                    const __m512bh probability = (__m512bh)_mm512_set1_epi32((int32_t)two);
                    first[r] = _mm512_dpbf16_ps(first[r], value_1, probability);
                    second[r] = _mm512_dpbf16_ps(second[r], value_2, probability);
                }
            }
            for (int64_t r = 0; r < count; ++r) {
                float *target = a->out + (image * a->tokens + start + r) * width + head * a->d + j;
                _mm512_storeu_ps(target, _mm512_mul_ps(first[r], _mm512_set1_ps(inverse_sum[r])));
                _mm512_storeu_ps(target + 16, _mm512_mul_ps(second[r], _mm512_set1_ps(inverse_sum[r])));
            }
        }
    }
    free(scores);
    free(keys);
}
