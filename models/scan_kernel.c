/* Selective scan: h_t = exp(step_t A) h_{t-1} + step_t u_t B_t, y_t = h_t C_t + skip u_t, and its gradients.
 *
 * A task is one sequence and one block of channels; its vectors hold neighbouring channels, so that no sum crosses lanes in the
 * recurrence. Time is walked in chunks: the forward pass keeps the states before each chunk, the backward pass computes those
 * within a chunk again. Gradients that sum over channels are summed per block, and then over the blocks in their order:
 * the number of threads changes no bit.
 *
 * Arrays are dense, row-major float32 and are not checked; models/scan_compiled.py does that.
 */
#include <stdint.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#define INLINE static inline __attribute__((always_inline))

enum { CHUNK = 16, BLOCK = 128, PADDING = 16 }; /* time steps, channels; kept states have a multiple of PADDING channels */

#define LOG2_E 1.44269504f
#define POLYNOMIAL_1 0.693147181f
#define POLYNOMIAL_2 0.24022349f
#define POLYNOMIAL_3 0.0555038101f
#define POLYNOMIAL_4 0.00966636852f
#define POLYNOMIAL_5 0.00133813025f

/* One sequence. Inputs and step (length, channels); state matrix (channels, states); input and output matrix (length, states). */
typedef struct {
    int64_t length, channels, states, padded;
    const float *inputs, *step, *state_matrix, *input_matrix, *output_matrix, *skip;
    float *starts; /* (chunks, states, padded) or null */
} Scan;

typedef struct {
    float *inputs, *step, *state_matrix, *input_matrix, *output_matrix, *skip;
} Gradients;

#define LANES 4
#define NAME(name) name##_plain
#include "scan_path.h"
#undef NAME
#undef LANES

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define LANES 8
#define NAME(name) name##_avx2
#include "scan_path.h"
#undef NAME
#undef LANES
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#endif
#define LANES 16
#define NAME(name) name##_avx512
#include "scan_path.h"
#undef NAME
#undef LANES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

typedef struct {
    void (*forward)(const Scan *, int64_t, float *, float *);
    void (*backward)(const Scan *, int64_t, const float *, const Gradients *, float *);
} Path;

static const Path PATHS[] = {
    {forward_plain, backward_plain},
#if defined(__x86_64__)
    {forward_avx2, backward_avx2},
    {forward_avx512, backward_avx512},
#endif
};

#define PRAGMA(text) _Pragma(#text)
#ifdef _OPENMP
#define PARALLEL(threads) PRAGMA(omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1))
#define THREAD omp_get_thread_num()
#else
#define PARALLEL(threads)
#define THREAD 0
#endif

static int64_t blocks_of(int64_t channels) { return (channels + BLOCK - 1) / BLOCK; }

static int64_t chunks_of(int64_t length) { return (length + CHUNK - 1) / CHUNK; }

static int64_t padded_of(int64_t channels) { return (channels + PADDING - 1) / PADDING * PADDING; }

/* ------------------------------------------------------------------ exported ---------------------------------------- */

/* The number of the best path of this machine; those below run too. */
int scan_best_path(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const int avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                       __builtin_cpu_supports("avx512vl");
    return avx2 && avx512 ? 2 : avx2 ? 1 : 0;
#else
    return 0;
#endif
}

int scan_has_threads(void) {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

/* Blocks of channels: each has its own share of the gradients of the input and the output matrix. */
int64_t scan_blocks(int64_t channels) { return blocks_of(channels); }

/* Floats that one thread needs as scratch memory, which begins at a multiple of 64 bytes. */
int64_t scan_scratch(int64_t states) { return 3 * BLOCK * states; }

/* Floats that one sequence needs for the states before its chunks. */
int64_t scan_starts(int64_t length, int64_t channels, int64_t states) {
    return chunks_of(length) * states * padded_of(channels);
}

/* One of the sequences; the parameters of the directions, (directions, ...), repeat with the images. */
static Scan sequence(const Scan *all, int64_t index, int64_t directions) {
    Scan s = *all;
    const int64_t rows = index * s.length, direction = index % directions;
    s.inputs += rows * s.channels;
    s.step += rows * s.channels;
    s.input_matrix += rows * s.states;
    s.output_matrix += rows * s.states;
    s.state_matrix += direction * s.channels * s.states;
    s.skip += direction * s.channels;
    if (s.starts) s.starts += index * scan_starts(s.length, s.channels, s.states);
    return s;
}

/* y (sequences, length, channels); `starts` may be null. Scratch is for as many threads. */
void scan_forward(int path, int threads, int64_t sequences, int64_t directions, int64_t length, int64_t channels, int64_t states,
                  const float *inputs, const float *step, const float *state_matrix, const float *input_matrix,
                  const float *output_matrix, const float *skip, float *starts, float *scratch, float *out) {
    const Scan all = {length, channels, states, padded_of(channels), inputs, step,
                      state_matrix, input_matrix, output_matrix, skip, starts};
    const int64_t blocks = blocks_of(channels);
    PARALLEL(threads)
    for (int64_t task = 0; task < sequences * blocks; ++task) {
        const int64_t index = task / blocks;
        const Scan s = sequence(&all, index, directions);
        PATHS[path].forward(&s, task % blocks, out + index * length * channels, scratch + THREAD * scan_scratch(states));
    }
}

/* The gradients, shaped as what they are gradients of, but per sequence: those of the state matrix are (sequences, channels,
 * states), of the skip (sequences, channels). `shares` holds (at_once, 2, blocks, length, states) floats.
 */
void scan_backward(int path, int threads, int64_t sequences, int64_t directions, int64_t length, int64_t channels, int64_t states,
                   const float *inputs, const float *step, const float *state_matrix, const float *input_matrix,
                   const float *output_matrix, const float *skip, float *starts, float *scratch, const float *out_gradient,
                   float *shares, int64_t at_once, float *inputs_gradient, float *step_gradient, float *state_matrix_gradient,
                   float *input_matrix_gradient, float *output_matrix_gradient, float *skip_gradient) {
    const Scan all = {length, channels, states, padded_of(channels), inputs, step,
                      state_matrix, input_matrix, output_matrix, skip, starts};
    const int64_t blocks = blocks_of(channels), rows = length * channels, share = length * states;
    for (int64_t first = 0; first < sequences; first += at_once) {
        const int64_t count = sequences - first < at_once ? sequences - first : at_once;
        PARALLEL(threads)
        for (int64_t task = 0; task < count * blocks; ++task) {
            const int64_t index = first + task / blocks, block = task % blocks;
            float *own = shares + (2 * (task / blocks) * blocks + block) * share;
            const Gradients to = {inputs_gradient + index * rows, step_gradient + index * rows,
                                  state_matrix_gradient + index * channels * states, own, own + blocks * share,
                                  skip_gradient + index * channels};
            const Scan s = sequence(&all, index, directions);
            PATHS[path].backward(&s, block, out_gradient + index * rows, &to, scratch + THREAD * scan_scratch(states));
        }
        PARALLEL(threads)
        for (int64_t task = 0; task < 2 * count; ++task) {
            float *to = (task % 2 ? output_matrix_gradient : input_matrix_gradient) + (first + task / 2) * share;
            const float *from = shares + task * blocks * share;
            memcpy(to, from, share * sizeof *to);
            for (int64_t block = 1; block < blocks; ++block)
                for (int64_t i = 0; i < share; ++i) to[i] += from[block * share + i];
        }
    }
}
