// Prefix attention of packed prompts: token i of a sequence sees token j when j <= i or j < prefix_len. Scores stay in
// registers and are rescaled as a larger one is met, so no S x S matrix exists. A block takes 64 queries of one head of one
// sequence, a warp 16; keys and values pass through shared memory in tiles of 64, one tile ahead.
//
// Given at compile time: HEAD_DIM (a multiple of 16, at most 128), NUM_HEADS, NUM_KV_HEADS (heads that share keys are neighbours).
#include "device.cuh"

constexpr int TILE = 64;
constexpr int THREADS = 128;
constexpr int COLUMNS = HEAD_DIM / 8;  // 16-byte columns of a row
constexpr int ROW_BYTES = HEAD_DIM * 2;
constexpr int TILE_BYTES = TILE * ROW_BYTES;
constexpr float NOTHING = -1e30f;

DEVICE u32 address(u32 tile, int row, int column) {
    const int swizzled = COLUMNS >= 8 ? column ^ (row & 7) : column ^ (row / (8 / COLUMNS) & (COLUMNS - 1));
    return tile + row * ROW_BYTES + swizzled * 16;
}

// q: [T, NUM_HEADS, HEAD_DIM], k, v: [T, NUM_KV_HEADS, HEAD_DIM], with strides in values; out: [T, NUM_HEADS, HEAD_DIM] contiguous.
extern "C" __global__ void __launch_bounds__(THREADS)
attend_prefill(const u16* q, const u16* k, const u16* v, u16* out, const int* __restrict__ query_starts,
               const int* __restrict__ prefix_lens, i64 token_stride, i64 head_stride, i64 kv_token_stride, i64 kv_head_stride,
               float scale) {
    extern __shared__ __align__(128) u8 shared[];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int head = blockIdx.y, sequence = blockIdx.z;
    const int start = query_starts[sequence];
    const int length = query_starts[sequence + 1] - start;
    // The longest tiles first: a late query may see more keys.
    const int first_query = ((int)gridDim.x - 1 - (int)blockIdx.x) * TILE;
    if (first_query >= length) return;
    const int prefix = min(prefix_lens[sequence], length);
    const int kv_end = max(prefix, min(length, first_query + TILE));

    const u32 query_tile = shared_address(shared);
    const u32 key_ring = query_tile + TILE_BYTES, value_ring = key_ring + 2 * TILE_BYTES;
    const int kv_head = head / (NUM_HEADS / NUM_KV_HEADS);
    const auto fetch = [&](u32 tile, const u16* source, int first, bool is_query = false) {
        source += is_query ? head * head_stride : kv_head * kv_head_stride;
        const i64 stride = is_query ? token_stride : kv_token_stride;
#pragma unroll
        for (int i = threadIdx.x; i < TILE * COLUMNS; i += THREADS) {
            const int row = i / COLUMNS, column = i % COLUMNS;
            // Rows past the end repeat the last one: finite, and masked below.
            const i64 token = start + min(first + row, length - 1);
            copy_async_16(address(tile, row, column), source + token * stride + column * 8);
        }
    };
    fetch(query_tile, q, first_query, true);
    fetch(key_ring, k, 0);
    copy_async_commit();
    fetch(value_ring, v, 0);
    copy_async_commit();

    u32 query[HEAD_DIM / 16][4];
    float sums[HEAD_DIM / 8][4] = {};
    float maximum[2] = {NOTHING, NOTHING}, total[2] = {0.0f, 0.0f};
    const float log2_scale = scale * 1.4426950408889634f;
    const int own_query = first_query + warp * 16 + lane / 4;

    const int num_tiles = (kv_end + TILE - 1) / TILE;
    for (int tile = 0; tile < num_tiles; tile++) {
        const int first_key = tile * TILE;
        const u32 keys = key_ring + tile % 2 * TILE_BYTES, values = value_ring + tile % 2 * TILE_BYTES;
        copy_async_wait<1>();  // the keys of this tile; its values may be on their way
        __syncthreads();
        if (tile == 0) {
#pragma unroll
            for (int s = 0; s < HEAD_DIM / 16; s++)
                load_matrix_x4(address(query_tile, warp * 16 + lane / 8 % 2 * 8 + lane % 8, s * 2 + lane / 16), query[s][0],
                               query[s][1], query[s][2], query[s][3]);
        }
        if (tile + 1 < num_tiles) fetch(key_ring + (tile + 1) % 2 * TILE_BYTES, k, first_key + TILE);
        copy_async_commit();

        float scores[TILE / 8][4] = {};
#pragma unroll
        for (int s = 0; s < HEAD_DIM / 16; s++) {
#pragma unroll
            for (int n = 0; n < TILE / 16; n++) {
                u32 b[4];
                load_matrix_x4(address(keys, n * 16 + lane / 16 * 8 + lane % 8, s * 2 + lane / 8 % 2), b[0], b[1], b[2], b[3]);
                mma_16x8x16(scores[n * 2], query[s], b[0], b[1]);
                mma_16x8x16(scores[n * 2 + 1], query[s], b[2], b[3]);
            }
        }
        const bool all_visible = first_key + TILE <= length &&
                                 (first_key + TILE <= prefix || first_key + TILE - 1 <= first_query + warp * 16);
#pragma unroll
        for (int n = 0; n < TILE / 8; n++) {
#pragma unroll
            for (int c = 0; c < 4; c++) {
                scores[n][c] *= log2_scale;
                if (!all_visible) {
                    const int key = first_key + n * 8 + lane % 4 * 2 + c % 2;
                    const int token = own_query + c / 2 * 8;
                    if (key >= length || (key > token && key >= prefix)) scores[n][c] = NOTHING;
                }
            }
        }
        float rescale[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float largest = maximum[r];
#pragma unroll
            for (int n = 0; n < TILE / 8; n++) largest = fmaxf(largest, fmaxf(scores[n][r * 2], scores[n][r * 2 + 1]));
            largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
            largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
            rescale[r] = exp2_fast(maximum[r] - largest);
            maximum[r] = largest;
            total[r] *= rescale[r];
        }
        u32 weights[TILE / 16][4];
#pragma unroll
        for (int n = 0; n < TILE / 8; n++) {
            float p[4];
#pragma unroll
            for (int c = 0; c < 4; c++) {
                p[c] = exp2_fast(scores[n][c] - maximum[c / 2]);
                total[c / 2] += p[c];
            }
            weights[n / 2][n % 2 * 2] = to_half2(p[0], p[1]);
            weights[n / 2][n % 2 * 2 + 1] = to_half2(p[2], p[3]);
        }
#pragma unroll
        for (int n = 0; n < HEAD_DIM / 8; n++) {
#pragma unroll
            for (int c = 0; c < 4; c++) sums[n][c] *= rescale[c / 2];
        }

        copy_async_wait<1>();  // the values of this tile; the next keys may be on their way
        __syncthreads();
        if (tile + 1 < num_tiles) fetch(value_ring + (tile + 1) % 2 * TILE_BYTES, v, first_key + TILE);
        copy_async_commit();
#pragma unroll
        for (int s = 0; s < TILE / 16; s++) {
#pragma unroll
            for (int n = 0; n < HEAD_DIM / 16; n++) {
                u32 b[4];
                load_matrix_x4_transposed(address(values, s * 16 + lane / 8 % 2 * 8 + lane % 8, n * 2 + lane / 16), b[0],
                                          b[1], b[2], b[3]);
                mma_16x8x16(sums[n * 2], weights[s], b[0], b[1]);
                mma_16x8x16(sums[n * 2 + 1], weights[s], b[2], b[3]);
            }
        }
    }
    copy_async_wait<0>();

#pragma unroll
    for (int r = 0; r < 2; r++) {
        total[r] += __shfl_xor_sync(0xffffffffu, total[r], 1);
        total[r] += __shfl_xor_sync(0xffffffffu, total[r], 2);
        const int token = own_query + r * 8;
        if (token >= length) continue;
        const float inverse = 1.0f / total[r];
        u16* destination = out + ((i64)(start + token) * NUM_HEADS + head) * HEAD_DIM + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < HEAD_DIM / 8; n++)
            *reinterpret_cast<u32*>(destination + n * 8) = to_half2(sums[n][r * 2] * inverse, sums[n][r * 2 + 1] * inverse);
    }
}
