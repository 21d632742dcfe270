/* What lies between the 8-bit matrix products of the float parts (the products are oneDNN's), one row at a time. Part of
 * path.h: compiled once per instruction set.
 *
 * A quantized row is 128 + round(x / scale) in unsigned bytes with scale = max |x| / 127, so 128 stands for 0.
 */

/* bytes 128 + round(values * inverse) of LANES values; adding 1.5 * 2^23 rounds to the nearest even integer */
INLINE void NAME(store_bytes)(uint8_t *target, V values, float inverse) {
    const I whole = (I)(values * inverse + 12582912.0f) - (0x4b400000 - 128);
#if PATH_AVX512
    _mm_storeu_si128((__m128i *)target, _mm512_cvtepi32_epi8((__m512i)whole));
#elif PATH_AVX2
    const __m128i low = _mm256_castsi256_si128((__m256i)whole), high = _mm256_extracti128_si256((__m256i)whole, 1);
    const __m128i words = _mm_packs_epi32(low, high);
    _mm_storel_epi64((__m128i *)target, _mm_packus_epi16(words, words));
#else
    int32_t buffer[LANES];
    memcpy(buffer, &whole, sizeof(buffer));
    for (int lane = 0; lane < LANES; ++lane) target[lane] = (uint8_t)buffer[lane];
#endif
}

INLINE V NAME(magnitude)(V values) { return (V)((I)values & 0x7fffffff); }

INLINE float NAME(largest)(V v) {
    float buffer[LANES], largest = 0;
    NAME(store)(buffer, v);
    for (int lane = 0; lane < LANES; ++lane) largest = buffer[lane] > largest || buffer[lane] != buffer[lane] ? buffer[lane] : largest;
    return largest;
}

/* Quantize one row of n values; returns its scale. */
INLINE float NAME(quantize_row)(const float *row, int64_t n, uint8_t *out) {
    V most = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) most = NAME(maximum)(NAME(magnitude)(NAME(load)(row + i)), most);
    if (i < n) most = NAME(maximum)(NAME(magnitude)(NAME(load_part)(row + i, n - i)), most);
    float scale = NAME(largest)(most) / 127.0f;
    if (scale < FLT_MIN) scale = 0; /* its inverse would overflow */
    const float inverse = scale > 0 ? 1.0f / scale : 0;
    for (i = 0; i + LANES <= n; i += LANES) NAME(store_bytes)(out + i, NAME(load)(row + i), inverse);
    if (i < n) {
        uint8_t bytes[LANES];
        NAME(store_bytes)(bytes, NAME(load_part)(row + i, n - i), inverse);
        memcpy(out + i, bytes, (size_t)(n - i));
    }
    return scale;
}

static void NAME(quantize_rows)(const float *x, int64_t first, int64_t last, int64_t n, uint8_t *out, float *scales) {
    for (int64_t row = first; row < last; ++row) scales[row] = NAME(quantize_row)(x + row * n, n, out + row * n);
}

static void NAME(layer_norm_quantize_rows)(const float *x, int64_t first, int64_t last, int64_t n, const float *weight,
                                           const float *bias, float eps, uint8_t *out, float *scales) {
    float normal[n];
    for (int64_t row = first; row < last; ++row) {
        float mean, inverse;
        const float *source = x + row * n;
        NAME(row_moments)(source, n, eps, &mean, &inverse);
        int64_t i = 0;
        for (; i + LANES <= n; i += LANES)
            NAME(store)(normal + i, (NAME(load)(source + i) - mean) * inverse * NAME(load)(weight + i) + NAME(load)(bias + i));
        for (; i < n; ++i) normal[i] = (source[i] - mean) * inverse * weight[i] + bias[i];
        scales[row] = NAME(quantize_row)(normal, n, out + row * n);
    }
}

/* x / 2 (1 + erf(x / sqrt 2)); erf by Abramowitz and Stegun 7.1.26, absolute error below 2e-7. */
INLINE V NAME(gelu)(V x) {
    const V z = NAME(magnitude)(x) * 0.70710678118654752f;
    const V t = 1.0f / (1.0f + 0.3275911f * z);
    V p = NAME(splat)(1.061405429f);
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    const V tail = p * t * NAME(exponential)(-(z * z)); /* 1 - erf(z) */
    return NAME(choose)(x < 0.0f, 0.5f * x * tail, x - 0.5f * x * tail);
}

/* GELU of sums * row scale + bias, quantized. */
static void NAME(gelu_quantize_rows)(const float *sums, int64_t first, int64_t last, int64_t n, const float *row_scales,
                                     const float *bias, uint8_t *out, float *scales) {
    float hidden[n];
    for (int64_t row = first; row < last; ++row) {
        const float *source = sums + row * n;
        int64_t i = 0;
        for (; i + LANES <= n; i += LANES)
            NAME(store)(hidden + i, NAME(gelu)(NAME(load)(source + i) * row_scales[row] + NAME(load)(bias + i)));
        if (i < n) {
            const V rest = NAME(load_part)(source + i, n - i) * row_scales[row] + NAME(load_part)(bias + i, n - i);
            float values[LANES];
            NAME(store)(values, NAME(gelu)(rest));
            memcpy(hidden + i, values, (size_t)(n - i) * sizeof(float));
        }
        scales[row] = NAME(quantize_row)(hidden, n, out + row * n);
    }
}

/* out = residual + layer_scale (sums * row scale + bias); layer_scale and residual may be null. */
static void NAME(rescale_rows)(const float *sums, int64_t first, int64_t last, int64_t n, const float *row_scales,
                               const float *bias, const float *layer_scale, const float *residual, float *out) {
    for (int64_t row = first; row < last; ++row) {
        const float scale = row_scales[row];
        for (int64_t i = row * n; i < (row + 1) * n; i += LANES) {
            const int64_t column = i - row * n, count = n - column < LANES ? n - column : LANES;
            if (count == LANES) {
                V value = NAME(load)(sums + i) * scale + NAME(load)(bias + column);
                if (layer_scale) value *= NAME(load)(layer_scale + column);
                if (residual) value += NAME(load)(residual + i);
                NAME(store)(out + i, value);
            } else {
                for (int64_t j = 0; j < count; ++j) {
                    float value = sums[i + j] * scale + bias[column + j];
                    if (layer_scale) value *= layer_scale[column + j];
                    out[i + j] = residual ? value + residual[i + j] : value;
                }
            }
        }
    }
}
