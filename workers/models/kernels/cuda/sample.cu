// The next token of each row of fp16 logits: temperature, top-k, top-p and one draw, or the largest. One block a row.
//
// Top-k without a sort of the vocabulary: each thread finds the largest of its share; the k-th largest of these is at most
// the k-th largest of all, so the few scores that reach it hold all candidates. They are ranked by falling score, then id.
// The draw is the inverse of the filtered distribution's CDF at a number hashed from (seed, token index).
//
// A row with a score that is not finite yields INVALID_TOKEN, as the released code's processor does.
//
// Given at compile time: VOCABULARY (row length), FIRST_ID, END_ID (ids that can be chosen), EOS_ID, INVALID_TOKEN.
#include "device.cuh"

constexpr int THREADS = 1024;
constexpr int VECTORS = VOCABULARY / 8;
constexpr int MAX_CANDIDATES = 2048;
constexpr u32 LOWEST = 0xfbff;  // -65504

static_assert(VOCABULARY % 8 == 0);

// Orders fp16 as unsigned integers.
DEVICE u32 order_of(u16 bits) { return bits & 0x8000 ? (u16)~bits : bits | 0x8000; }

DEVICE float score_of(u32 order) { return to_float(order & 0x8000 ? (u16)(order & 0x7fff) : (u16)~order); }

DEVICE u32 max_half2(u32 a, u32 b) {
    u32 c;
    asm("max.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
    return c;
}

DEVICE u32 max_half2_or_nan(u32 a, u32 b) {
    u32 c;
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
    return c;
}

DEVICE u32 order_of_largest(u32 pair) { return max(order_of((u16)pair), order_of((u16)(pair >> 16))); }

DEVICE u64 mix(u64 x) {
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

DEVICE u16 half_of(const uint4& v, int i) {
    const u32 word = i < 2 ? v.x : i < 4 ? v.y : i < 6 ? v.z : v.w;
    return (u16)(word >> i % 2 * 16);
}

// A falling score, then a rising id, as one number that falls.
DEVICE u64 composite_of(u32 order, int id) { return (u64)order << 32 | (u32)~id; }

// Several loads of a thread are under way at the same time: one block has to draw on much of the memory's bandwidth.
template <typename Visit>
DEVICE void for_each_vector(const uint4* scores, Visit visit) {
    constexpr int BATCH = 8;
    for (int base = threadIdx.x; base < VECTORS; base += THREADS * BATCH) {
        uint4 vectors[BATCH];
#pragma unroll
        for (int b = 0; b < BATCH; b++)
            if (base + b * THREADS < VECTORS) vectors[b] = scores[base + b * THREADS];
#pragma unroll
        for (int b = 0; b < BATCH; b++)
            if (base + b * THREADS < VECTORS) visit(vectors[b], base + b * THREADS);
    }
}

// Inclusive prefix sum over a warp.
DEVICE double warp_scan(double value, int lane) {
#pragma unroll
    for (int offset = 1; offset < WARP; offset *= 2) {
        const double other = __shfl_up_sync(0xffffffffu, value, offset);
        if (lane >= offset) value += other;
    }
    return value;
}

// rows[i]: where row i's token goes in last_tokens, besides tokens[i]. temperatures: 0 for the largest. min_new_tokens:
// the end token cannot come before so many.
extern "C" __global__ void __launch_bounds__(THREADS)
sample(const u16* logits, const float* __restrict__ temperatures, const int* __restrict__ top_ks,
       const double* __restrict__ top_ps, const i64* __restrict__ seeds, const i64* __restrict__ token_indexes,
       const int* __restrict__ min_new_tokens, const int* __restrict__ rows, i64* tokens, i64* last_tokens) {
    __shared__ u64 candidates[MAX_CANDIDATES];
    __shared__ float sorted[MAX_CANDIDATES];
    __shared__ int sorted_ids[MAX_CANDIDATES];
    __shared__ int num_found, num_reached, chosen;
    const int row = blockIdx.x, lane = threadIdx.x % WARP;
    const float temperature = temperatures[row];
    const bool may_not_end = token_indexes[row] < min_new_tokens[row];
    allow_next_kernel();
    wait_for_previous_kernel();

    const uint4* scores = reinterpret_cast<const uint4*>(logits + (i64)row * VOCABULARY);
    const auto can_be_chosen = [&](int id) {
        return id >= FIRST_ID && id < END_ID && !(id == EOS_ID && may_not_end);
    };
    // Ids that cannot be chosen get the lowest finite score; few vectors hold one.
    const auto masked = [&](uint4 vector, int v) {
        if (v * 8 < FIRST_ID || v * 8 + 8 > END_ID || v == EOS_ID / 8) {
            u32 words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
            for (int i = 0; i < 8; i++)
                if (!can_be_chosen(v * 8 + i)) words[i / 2] = words[i / 2] & ~(0xffffu << i % 2 * 16) | LOWEST << i % 2 * 16;
            vector = make_uint4(words[0], words[1], words[2], words[3]);
        }
        return vector;
    };
    const auto largest_of = [&](const uint4& vector) {
        return max_half2(max_half2(vector.x, vector.y), max_half2(vector.z, vector.w));
    };

    // The largest of this thread's share, and the largest magnitude (NaN counts as such).
    u32 largest = LOWEST | LOWEST << 16, magnitude = 0;
    for_each_vector(scores, [&](const uint4& raw, int v) {
        const uint4 vector = masked(raw, v);
        largest = max_half2(largest, largest_of(vector));
        magnitude = max_half2_or_nan(magnitude, max_half2_or_nan(max_half2_or_nan(vector.x & 0x7fff7fff, vector.y & 0x7fff7fff),
                                                                 max_half2_or_nan(vector.z & 0x7fff7fff, vector.w & 0x7fff7fff)));
    });
    const bool is_invalid = (magnitude & 0x7c00u) == 0x7c00u || (magnitude & 0x7c000000u) == 0x7c000000u;
    const u32 own = order_of_largest(largest);

    const auto collect = [&](u64 bound) {
        __syncthreads();
        if (threadIdx.x == 0) num_found = 0;
        __syncthreads();
        for_each_vector(scores, [&](const uint4& raw, int v) {
            if (order_of_largest(largest_of(masked(raw, v))) < (u32)(bound >> 32)) return;
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const u64 composite = composite_of(order_of(half_of(raw, i)), v * 8 + i);
                if (can_be_chosen(v * 8 + i) && composite >= bound) {
                    const int place = atomicAdd(&num_found, 1);
                    if (place < MAX_CANDIDATES) candidates[place] = composite;
                }
            }
        });
        __syncthreads();
    };
    int token = FIRST_ID + INVALID_TOKEN;
    if (!__syncthreads_or(is_invalid)) {
        const bool is_greedy = temperature == 0.0f;
        const int top_k = is_greedy ? 1 : max(1, min(top_ks[row], END_ID - FIRST_ID));
        // The top_k-th largest of the threads' largest, bit by bit.
        u32 floor = 0;
        for (int bit = 15; bit >= 0; bit--) {
            const u32 trial = floor | 1u << bit;
            if (__syncthreads_count(own >= trial) >= top_k) floor = trial;
        }
        collect((u64)floor << 32);
        if (num_found > MAX_CANDIDATES) {
            // Many equal scores: the best MAX_CANDIDATES of all, their bound found bit by bit. Rare, and slow.
            u64 bound = 0;
            for (int bit = 47; bit >= 0; bit--) {
                const u64 trial = bound | 1ull << bit;
                int reached = 0;
                for_each_vector(scores, [&](const uint4& raw, int v) {
#pragma unroll
                    for (int i = 0; i < 8; i++)
                        reached += can_be_chosen(v * 8 + i) && composite_of(order_of(half_of(raw, i)), v * 8 + i) >= trial;
                });
                __syncthreads();
                if (threadIdx.x == 0) num_reached = 0;
                __syncthreads();
                atomicAdd(&num_reached, reached);
                __syncthreads();
                if (num_reached >= MAX_CANDIDATES) bound = trial;
            }
            collect(bound);
        }
        const int count = min(num_found, MAX_CANDIDATES);
        for (int c = threadIdx.x; c < count; c += THREADS) {
            const u64 mine = candidates[c];
            int rank = 0;
            for (int other = 0; other < count; other++) rank += candidates[other] > mine;
            sorted[rank] = score_of((u32)(mine >> 32)) / (is_greedy ? 1.0f : temperature);
            sorted_ids[rank] = (int)~(u32)mine;
        }
        __syncthreads();
        if (is_greedy) {
            if (threadIdx.x == 0) chosen = sorted_ids[0];
        } else if (threadIdx.x < WARP) {
            // Top-k keeps every score that equals the k-th.
            const float least = sorted[min(top_k, count) - 1], best = sorted[0];
            double total = 0.0;
            for (int c = lane; c < count; c += WARP)
                if (sorted[c] >= least) total += (double)__expf(sorted[c] - best);
#pragma unroll
            for (int offset = WARP / 2; offset > 0; offset /= 2) total += __shfl_xor_sync(0xffffffffu, total, offset);
            // Top-p keeps what comes before its share is reached; then the draw falls among what is kept.
            const double top_p = top_ps[row];
            const double limit = top_p >= 1.0 ? 2.0 * total : top_p * total;
            const u64 bits = mix(mix((u64)seeds[row]) + (u64)token_indexes[row] * 0x9e3779b97f4a7c15ull) >> 12;
            const double uniform = (double)bits * 2.220446049250313e-16;
            double kept = 0.0;
            for (int pass = 0; pass < 2; pass++) {
                double carry = 0.0, kept_here = 0.0;
                int found = 0;
                for (int base = 0; base < count; base += WARP) {
                    const int c = base + lane;
                    const double p = c < count && sorted[c] >= least ? (double)__expf(sorted[c] - best) : 0.0;
                    const double after = carry + warp_scan(p, lane);
                    const bool is_kept = p > 0.0 && (after - p < limit || c == 0);
                    if (pass == 0) {
                        kept_here = fmax(kept_here, is_kept ? after : 0.0);
                    } else {
                        found += __popc(__ballot_sync(0xffffffffu, is_kept && after <= uniform * kept));
                    }
                    carry = __shfl_sync(0xffffffffu, after, WARP - 1);
                }
#pragma unroll
                for (int offset = WARP / 2; offset > 0; offset /= 2)
                    kept_here = fmax(kept_here, __shfl_xor_sync(0xffffffffu, kept_here, offset));
                if (pass == 0) kept = kept_here;
                if (pass == 1 && lane == 0) chosen = sorted_ids[min(found, count - 1)];
            }
        }
        __syncthreads();
        token = chosen;
    }
    if (threadIdx.x == 0) {
        tokens[row] = token;
        last_tokens[rows[row]] = token;
    }
}
