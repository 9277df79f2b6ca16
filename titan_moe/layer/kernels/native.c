/* The kernels of eager.py for bf16 and fp32 rows on a CPU, one pass over memory each.
 *
 * Included once per row type (see the end). Every loop treats an element by its column and never by its
 * row, so a row's bits do not depend on where in the batch it stands. Compiled without contraction:
 * a multiplication and an addition round separately, as they do in torch.
 * OpenMP's functions come from the library that torch has loaded, so that both share one pool of threads.
 */
#ifndef ROW

#include <stdint.h>
#include <string.h>

#define LANES 16 /* of a dot product: summed apart, then pairwise */
#define BLOCK 512 /* columns that are accumulated at a time: 2 KiB */

typedef uint16_t bf16;

static inline float bits_to_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline uint32_t float_to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

static inline float load_bf16(bf16 value) { return bits_to_float((uint32_t)value << 16); }

/* To the nearest, ties to even; NaN becomes torch's. */
static inline bf16 store_bf16(float value) {
    uint32_t bits = float_to_bits(value);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
    return (bf16)((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

static inline float load_f32(float value) { return value; }
static inline float store_f32(float value) { return value; }

/* exp(x) to about 1 ulp: 2^n times a polynomial on [-ln2/2, ln2/2] (Cephes' expf). Infinite above 88.37. */
static inline float exp_f32(float x) {
    x = x > -87.3f ? x : -87.3f; /* NaN as well: who calls multiplies by x again */
    x = x < 88.7f ? x : 88.7f;
    float shifted = x * 1.44269504088896341f + 12582912.0f; /* rounds to an integer in the low bits */
    float n = shifted - 12582912.0f;
    float r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    return p * bits_to_float((uint32_t)((int32_t)n + 127) << 23);
}

static inline float sigmoid_f32(float x) { return 1.0f / (1.0f + exp_f32(-x)); }

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define NAME(function) JOIN(function, ROW)
#define LOAD JOIN(load, ROW)
#define STORE JOIN(store, ROW)
#define PARALLEL _Pragma("omp parallel for num_threads(threads) if (threads > 1) schedule(static)")

#define ROW bf16
#define TYPE bf16
#include "native.c"
#undef ROW
#undef TYPE
#define ROW f32
#define TYPE float
#include "native.c"

#else

/* also: NULL, or what is added to y first, without scores; scores: NULL for a sum without weights;
 * present: NULL where every slot has a row. */
void NAME(sum)(TYPE *out, const TYPE *y, const TYPE *also, const float *scores, const int64_t *place, const uint8_t *present,
               int64_t T, int64_t K, int64_t D, int threads) {
    PARALLEL
    for (int64_t t = 0; t < T; t++) {
        for (int64_t first = 0; first < D; first += BLOCK) {
            int64_t width = D - first < BLOCK ? D - first : BLOCK;
            float sum[BLOCK];
            /* -0 is the sum of no rows: it leaves even a -0 as it is. */
            for (int64_t d = 0; d < width; d++) sum[d] = scores ? 0.0f : -0.0f;
            for (int64_t slot = t * K; slot < (t + 1) * K; slot++) {
                int64_t at = place[slot] * D + first;
                const TYPE *row = y + at;
                if (present && !present[slot]) {
                    for (int64_t d = 0; d < width; d++) sum[d] += 0.0f;
                } else if (scores) {
                    float score = scores[slot];
                    for (int64_t d = 0; d < width; d++) sum[d] += LOAD(row[d]) * score;
                } else if (also) {
                    const TYPE *more = also + at;
                    for (int64_t d = 0; d < width; d++) sum[d] += LOAD(STORE(LOAD(row[d]) + LOAD(more[d])));
                } else {
                    for (int64_t d = 0; d < width; d++) sum[d] += LOAD(row[d]);
                }
            }
            for (int64_t d = 0; d < width; d++) out[t * D + first + d] = STORE(sum[d]);
        }
    }
}

void NAME(weighted_sum_backward)(TYPE *grad_y, float *grad_score, const TYPE *grad, const TYPE *y,
                                 const float *scores, const int64_t *order, int64_t N, int64_t K, int64_t D,
                                 int threads) {
    PARALLEL
    for (int64_t n = 0; n < N; n++) {
        const TYPE *g = grad + order[n] / K * D, *row = y + n * D;
        TYPE *out = grad_y + n * D;
        float score = scores[order[n]], dot[LANES] = {0};
        int64_t whole = D / LANES * LANES;
        for (int64_t d = 0; d < whole; d += LANES) {
            for (int lane = 0; lane < LANES; lane++) {
                float value = LOAD(g[d + lane]);
                dot[lane] += value * LOAD(row[d + lane]);
                out[d + lane] = STORE(value * score);
            }
        }
        for (int64_t d = whole; d < D; d++) {
            float value = LOAD(g[d]);
            dot[d - whole] += value * LOAD(row[d]);
            out[d] = STORE(value * score);
        }
        for (int half = LANES / 2; half > 0; half /= 2)
            for (int lane = 0; lane < half; lane++) dot[lane] += dot[lane + half];
        grad_score[n] = dot[0];
    }
}

void NAME(swiglu)(TYPE *out, const TYPE *gate, const TYPE *up, int64_t R, int64_t F, int threads) {
    PARALLEL
    for (int64_t r = 0; r < R; r++) {
        for (int64_t i = r * F; i < (r + 1) * F; i++) {
            float value = LOAD(gate[i]);
            out[i] = STORE(value * sigmoid_f32(value) * LOAD(up[i]));
        }
    }
}

void NAME(swiglu_backward)(TYPE *grad_gate, TYPE *grad_up, const TYPE *grad, const TYPE *gate, const TYPE *up,
                           int64_t R, int64_t F, int threads) {
    PARALLEL
    for (int64_t r = 0; r < R; r++) {
        for (int64_t i = r * F; i < (r + 1) * F; i++) {
            float g = LOAD(grad[i]), value = LOAD(gate[i]), s = sigmoid_f32(value);
            grad_gate[i] = STORE((g * LOAD(up[i])) * (s * (1.0f + value * (1.0f - s))));
            grad_up[i] = STORE(g * (value * s));
        }
    }
}

#endif
