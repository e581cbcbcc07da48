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
constexpr u32 NEVER = 0;

static_assert(VOCABULARY % 8 == 0);

// Orders fp16 as unsigned integers; 0 stands below every finite number.
DEVICE u32 order_of(u16 bits) { return bits & 0x8000 ? (u16)~bits : bits | 0x8000; }

DEVICE float score_of(u32 order) { return to_float(order & 0x8000 ? (u16)(order & 0x7fff) : (u16)~order); }

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
    __shared__ u64 warp_best[THREADS / WARP];
    __shared__ int num_found, chosen;
    const int row = blockIdx.x, lane = threadIdx.x % WARP;
    const float temperature = temperatures[row];
    const bool may_not_end = token_indexes[row] < min_new_tokens[row];
    allow_next_kernel();
    wait_for_previous_kernel();

    const uint4* scores = reinterpret_cast<const uint4*>(logits + (i64)row * VOCABULARY);
    const auto order_at = [&](const uint4& vector, int first, int i) -> u32 {
        const int id = first + i;
        if (id < FIRST_ID || id >= END_ID || (id == EOS_ID && may_not_end)) return NEVER;
        return order_of(half_of(vector, i));
    };
    // The largest of this thread's share: order, then the smaller id.
    u64 best = 0;
    bool is_invalid = false;
    for (int v = threadIdx.x; v < VECTORS; v += THREADS) {
        const uint4 vector = scores[v];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int id = v * 8 + i;
            const u32 order = order_at(vector, v * 8, i);
            is_invalid |= id >= FIRST_ID && id < END_ID && (half_of(vector, i) & 0x7c00) == 0x7c00;
            const u64 composite = (u64)order << 32 | (u32)~id;
            best = order != NEVER && composite > best ? composite : best;
        }
    }
    int token = FIRST_ID + INVALID_TOKEN;
    if (__syncthreads_or(is_invalid)) {
        // keeps `token`
    } else if (temperature == 0.0f) {
#pragma unroll
        for (int offset = WARP / 2; offset > 0; offset /= 2) {
            const u64 other = __shfl_xor_sync(0xffffffffu, best, offset);
            best = other > best ? other : best;
        }
        if (lane == 0) warp_best[threadIdx.x / WARP] = best;
        __syncthreads();
        for (int w = 0; w < THREADS / WARP; w++) best = warp_best[w] > best ? warp_best[w] : best;
        token = (int)~(u32)best;
    } else {
        const int top_k = max(1, min(top_ks[row], END_ID - FIRST_ID));
        // The top_k-th largest of the threads' bests, bit by bit.
        const u32 own = (u32)(best >> 32);
        u32 floor = 0;
        for (int bit = 15; bit >= 0; bit--) {
            const u32 trial = floor | 1u << bit;
            if (__syncthreads_count(own >= trial) >= top_k) floor = trial;
        }
        if (threadIdx.x == 0) num_found = 0;
        __syncthreads();
        floor = floor > 0 ? floor : 1;
        for (int v = threadIdx.x; v < VECTORS; v += THREADS) {
            const uint4 vector = scores[v];
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const u32 order = order_at(vector, v * 8, i);
                if (order >= floor) {
                    const int place = atomicAdd(&num_found, 1);
                    if (place < MAX_CANDIDATES) candidates[place] = (u64)order << 32 | (u32) ~(v * 8 + i);
                }
            }
        }
        __syncthreads();
        const int count = min(num_found, MAX_CANDIDATES);
        for (int c = threadIdx.x; c < count; c += THREADS) {
            const u64 mine = candidates[c];
            int rank = 0;
            for (int other = 0; other < count; other++) rank += candidates[other] > mine;
            sorted[rank] = score_of((u32)(mine >> 32)) / temperature;
            sorted_ids[rank] = (int)~(u32)mine;
        }
        __syncthreads();
        if (threadIdx.x < WARP) {
            // Top-k keeps every score that equals the k-th.
            const float least = sorted[min(top_k, count) - 1], largest = sorted[0];
            double total = 0.0;
            for (int c = lane; c < count; c += WARP)
                if (sorted[c] >= least) total += (double)__expf(sorted[c] - largest);
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
                    const double p = c < count && sorted[c] >= least ? (double)__expf(sorted[c] - largest) : 0.0;
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
