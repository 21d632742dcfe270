/* One path of the selective scan. scan_kernel.c includes this once per instruction set, with LANES channels in a vector and
 * NAME(x) as the name of x there.
 */
typedef float NAME(Lanes) __attribute__((vector_size(4 * LANES)));
typedef uint32_t NAME(Bits) __attribute__((vector_size(4 * LANES)));
#define V NAME(Lanes)
#define MOST_VECTORS (BLOCK / LANES)

/* 2^x with a relative error of about 2e-7, at most 2^127.99 and at least 2^-126; NaN stays NaN. */
INLINE V NAME(power_of_two)(V x) {
    for (int lane = 0; lane < LANES; ++lane) x[lane] = x[lane] > 127.99f ? 127.99f : x[lane] < -126.f ? -126.f : x[lane];
    const V shifted = x + 12582912.f; /* 1.5 * 2^23: rounds x to an integer, which then is in the lowest bits */
    const V r = x - (shifted - 12582912.f);
    /* Chebyshev interpolation of (2^r - 1) / r over [-0.5, 0.5]: exactly 1 at r = 0, so slow decays stay exact */
    const V power = 1.f + r * (POLYNOMIAL_1 + r * (POLYNOMIAL_2 + r * (POLYNOMIAL_3 + r * (POLYNOMIAL_4 + r * POLYNOMIAL_5))));
    return (V)((NAME(Bits))power + ((NAME(Bits))shifted << 23));
}

INLINE float NAME(sum_of_lanes)(V v) {
    float lanes[LANES];
    memcpy(lanes, &v, sizeof lanes);
    for (int half = LANES / 2; half; half /= 2)
        for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
    return lanes[0];
}

/* The vector at `from`; lanes from `count` on are 0. */
INLINE V NAME(load)(const float *from, int64_t count) {
    V v = {0};
    memcpy(&v, from, count < LANES ? 4 * (size_t)count : sizeof v);
    return v;
}

INLINE void NAME(store)(float *to, V v, int64_t count) { memcpy(to, &v, count < LANES ? 4 * (size_t)count : sizeof v); }

/* What a block of channels keeps from chunk to chunk and within one. */
typedef struct {
    int64_t first, channels, vectors;
    V *exponent, *state, *gradient; /* (states, vectors): A log2(e); state or its adjoint; gradient of A */
    V skip[MOST_VECTORS], skip_gradient[MOST_VECTORS];
    V step[MOST_VECTORS][CHUNK], inputs[MOST_VECTORS][CHUNK], drive[MOST_VECTORS][CHUNK]; /* drive = step * inputs */
    V output[MOST_VECTORS][CHUNK];                                                         /* y or its gradient */
    V drive_gradient[MOST_VECTORS][CHUNK], exponent_gradient[MOST_VECTORS][CHUNK];
} NAME(Block);

static void NAME(begin)(NAME(Block) *b, const Scan *s, int64_t block, float *scratch) {
    memset(b, 0, sizeof *b);
    b->first = block * BLOCK;
    b->channels = s->channels - b->first < BLOCK ? s->channels - b->first : BLOCK;
    b->vectors = (b->channels + LANES - 1) / LANES;
    b->exponent = (V *)scratch;
    b->state = b->exponent + s->states * b->vectors;
    b->gradient = b->state + s->states * b->vectors;
    memset(scratch, 0, 3 * s->states * b->vectors * sizeof(V));
    for (int64_t i = 0; i < b->channels; ++i)
        for (int64_t n = 0; n < s->states; ++n)
            b->exponent[n * b->vectors + i / LANES][i % LANES] = LOG2_E * s->state_matrix[(b->first + i) * s->states + n];
    for (int64_t v = 0; v < b->vectors; ++v) b->skip[v] = NAME(load)(s->skip + b->first + v * LANES, b->channels - v * LANES);
}

static void NAME(load_rows)(NAME(Block) *b, V rows[][CHUNK], const float *from, int64_t stride, int64_t steps) {
    for (int64_t t = 0; t < steps; ++t)
        for (int64_t v = 0; v < b->vectors; ++v)
            rows[v][t] = NAME(load)(from + t * stride + b->first + v * LANES, b->channels - v * LANES);
}

static void NAME(store_rows)(const NAME(Block) *b, float *to, V rows[][CHUNK], int64_t stride, int64_t steps) {
    for (int64_t t = 0; t < steps; ++t)
        for (int64_t v = 0; v < b->vectors; ++v)
            NAME(store)(to + t * stride + b->first + v * LANES, rows[v][t], b->channels - v * LANES);
}

static void NAME(load_chunk)(NAME(Block) *b, const Scan *s, int64_t start, int64_t steps) {
    NAME(load_rows)(b, b->step, s->step + start * s->channels, s->channels, steps);
    NAME(load_rows)(b, b->inputs, s->inputs + start * s->channels, s->channels, steps);
    for (int64_t v = 0; v < b->vectors; ++v)
        for (int64_t t = 0; t < steps; ++t) b->drive[v][t] = b->step[v][t] * b->inputs[v][t];
}

/* y of one block of channels; the states before each chunk go to s->starts if there is such. */
static void NAME(forward)(const Scan *s, int64_t block, float *out, float *scratch) {
    NAME(Block) b;
    NAME(begin)(&b, s, block, scratch);
    for (int64_t start = 0; start < s->length; start += CHUNK) {
        const int64_t steps = s->length - start < CHUNK ? s->length - start : CHUNK;
        NAME(load_chunk)(&b, s, start, steps);
        for (int64_t v = 0; v < b.vectors; ++v)
            for (int64_t t = 0; t < steps; ++t) b.output[v][t] = b.skip[v] * b.inputs[v][t];
        const float *input_row = s->input_matrix + start * s->states, *output_row = s->output_matrix + start * s->states;
        float *kept = s->starts ? s->starts + start / CHUNK * s->states * s->padded + b.first : 0;
        for (int64_t n = 0; n < s->states; ++n)
            for (int64_t v = 0; v < b.vectors; ++v) {
                const V exponent = b.exponent[n * b.vectors + v];
                V state = b.state[n * b.vectors + v];
                if (kept) NAME(store)(kept + n * s->padded + v * LANES, state, LANES);
                for (int64_t t = 0; t < steps; ++t) {
                    state = NAME(power_of_two)(b.step[v][t] * exponent) * state + b.drive[v][t] * input_row[t * s->states + n];
                    b.output[v][t] += state * output_row[t * s->states + n];
                }
                b.state[n * b.vectors + v] = state;
            }
        NAME(store_rows)(&b, out + start * s->channels, b.output, s->channels, steps);
    }
}

/* One state of all channels of the block through one chunk: recompute it forwards, then its adjoint backwards. */
static void NAME(backward_state)(NAME(Block) *b, const Scan *s, const Gradients *to, int64_t start, int64_t steps, int64_t n) {
    const float *input_row = s->input_matrix + start * s->states + n, *output_row = s->output_matrix + start * s->states + n;
    const float *kept = s->starts + (start / CHUNK * s->states + n) * s->padded + b->first;
    V input_sum[CHUNK] = {{0}}, output_sum[CHUNK] = {{0}};
    for (int64_t v = 0; v < b->vectors; ++v) {
        const V exponent = b->exponent[n * b->vectors + v];
        V state = NAME(load)(kept + v * LANES, LANES), before[CHUNK], decay[CHUNK];
        for (int64_t t = 0; t < steps; ++t) {
            before[t] = state;
            decay[t] = NAME(power_of_two)(b->step[v][t] * exponent);
            state = decay[t] * state + b->drive[v][t] * input_row[t * s->states];
            output_sum[t] += b->output[v][t] * state;
        }
        V carried = b->state[n * b->vectors + v], gradient = b->gradient[n * b->vectors + v];
        for (int64_t t = steps - 1; t >= 0; --t) {
            const V adjoint = carried + b->output[v][t] * output_row[t * s->states];
            input_sum[t] += adjoint * b->drive[v][t];
            b->drive_gradient[v][t] += adjoint * input_row[t * s->states];
            carried = adjoint * decay[t];
            const V of_exponent = carried * before[t];
            b->exponent_gradient[v][t] += of_exponent * exponent;
            gradient += of_exponent * b->step[v][t];
        }
        b->state[n * b->vectors + v] = carried;
        b->gradient[n * b->vectors + v] = gradient;
    }
    for (int64_t t = 0; t < steps; ++t) {
        to->input_matrix[(start + t) * s->states + n] = NAME(sum_of_lanes)(input_sum[t]);
        to->output_matrix[(start + t) * s->states + n] = NAME(sum_of_lanes)(output_sum[t]);
    }
}

/* All gradients of one block of channels; those of the input and output matrix are this block's share. */
static void NAME(backward)(const Scan *s, int64_t block, const float *out_gradient, const Gradients *to, float *scratch) {
    NAME(Block) b;
    NAME(begin)(&b, s, block, scratch);
    for (int64_t start = (s->length - 1) / CHUNK * CHUNK; start >= 0; start -= CHUNK) {
        const int64_t steps = s->length - start < CHUNK ? s->length - start : CHUNK, offset = start * s->channels;
        NAME(load_chunk)(&b, s, start, steps);
        NAME(load_rows)(&b, b.output, out_gradient + offset, s->channels, steps);
        memset(b.drive_gradient, 0, sizeof b.drive_gradient);
        memset(b.exponent_gradient, 0, sizeof b.exponent_gradient);
        for (int64_t n = 0; n < s->states; ++n) NAME(backward_state)(&b, s, to, start, steps, n);
        for (int64_t v = 0; v < b.vectors; ++v)
            for (int64_t t = 0; t < steps; ++t) {
                const V inputs = b.inputs[v][t], of_drive = b.drive_gradient[v][t];
                b.inputs[v][t] = of_drive * b.step[v][t] + b.skip[v] * b.output[v][t];
                b.step[v][t] = of_drive * inputs + b.exponent_gradient[v][t] / LOG2_E;
                b.skip_gradient[v] += b.output[v][t] * inputs;
            }
        NAME(store_rows)(&b, to->inputs + offset, b.inputs, s->channels, steps);
        NAME(store_rows)(&b, to->step + offset, b.step, s->channels, steps);
    }
    for (int64_t i = 0; i < b.channels; ++i) {
        to->skip[b.first + i] = b.skip_gradient[i / LANES][i % LANES];
        for (int64_t n = 0; n < s->states; ++n)
            to->state_matrix[(b.first + i) * s->states + n] = b.gradient[n * b.vectors + i / LANES][i % LANES];
    }
}

#undef V
#undef MOST_VECTORS
