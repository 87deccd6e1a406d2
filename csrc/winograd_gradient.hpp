// Gradients of 3 x 3 kernels with 16 products where a sum over positions takes 36. The gradients of the
// outputs are transformed to the points by the adjoint of the outputs' transform; at each point, the kernel's
// gradient is a product over tiles; it is transformed back by the adjoint of the kernel's transform.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "layer.hpp"

#ifdef USF_PRODUCTS

namespace usf {

// One-dimensional transform, in place, of the gradients of 2 outputs to those of 4 points.
template <class V>
USF_INLINE void gradient_to_points(V* g, int step) {
    g[3 * step] = -g[step];
    g[2 * step] = g[0] - g[step];
    g[step] += g[0];
}

// Transforms the gradients of a tile's outputs, which are the rows beside it (null for zeros), to the points.
template <int lanes>
USF_INLINE void enter_gradients(const WinogradTile<2>& tile, std::ptrdiff_t apart, int channel, float* to) {
    using V = typename Vector<lanes>::type;
    using U = typename Vector<lanes>::unaligned;
    V g[TileSizes<2>::points];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
        g[i / 2 * 4 + i % 2] =
            tile.beside[i] ? V(*reinterpret_cast<const U*>(tile.beside[i] + channel)) : V{};
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) gradient_to_points(g + i, 4);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) gradient_to_points(g + 4 * i, 1);
#pragma GCC unroll 16
    for (int i = 0; i < TileSizes<2>::points; ++i) *reinterpret_cast<U*>(to + i * apart) = g[i];
}

// Transforms inputs of tiles to panels of [inputs, tiles] at each point, gradients to [tiles, outputs].
inline void enter_both(const std::vector<WinogradTile<2>>& tiles, int inputs, int outputs, int lanes,
                       float* panels, float* gradients) {
    with_lanes(lanes, [&]<int widest>() USF_LAMBDA {
        constexpr int width = 2 * widest;
        const std::ptrdiff_t count = static_cast<std::ptrdiff_t>(tiles.size());
        const std::ptrdiff_t apart = count * Panels::padded(inputs, width);
        for (std::ptrdiff_t t = 0; t < count; ++t) {
            for (int first = 0; first < inputs; first += width) {
                float* const to = panels + first * count + t * width;
                for_channels<widest>(std::min(width, inputs - first), [&]<int n>(int c) USF_LAMBDA {
                    enter_channels<n>(tiles[t], apart, first + c, to + c);
                });
            }
            float* const to = gradients + t * outputs;
            for_channels<widest>(outputs, [&]<int n>(int c) USF_LAMBDA {
                enter_gradients<n>(tiles[t], count * outputs, c, to + c);
            });
        }
    });
}

// Transforms the gradients of one output's kernels from all points, [inputs] each, to [inputs, 9].
USF_CLONES inline void kernels_from_points(const float* at_points, std::size_t apart, int inputs,
                                           float* __restrict to) {
    constexpr int some = 32;
    for (int first = 0; first < inputs; first += some) {
        const int count = std::min(some, inputs - first);
        float rows[3][4][some], g[9][some];
        for (int x = 0; x < 4; ++x) {
            const float* const m = at_points + x * apart + first;
            const std::size_t down = 4 * apart;
            for (int i = 0; i < count; ++i) {
                const float sum = 0.5f * (m[down + i] + m[2 * down + i]);
                rows[0][x][i] = m[i] + sum, rows[2][x][i] = sum + m[3 * down + i];
                rows[1][x][i] = 0.5f * (m[down + i] - m[2 * down + i]);
            }
        }
        for (int y = 0; y < 3; ++y)
            for (int i = 0; i < count; ++i) {
                const float sum = 0.5f * (rows[y][1][i] + rows[y][2][i]);
                g[3 * y][i] = rows[y][0][i] + sum, g[3 * y + 2][i] = sum + rows[y][3][i];
                g[3 * y + 1][i] = 0.5f * (rows[y][1][i] - rows[y][2][i]);
            }
        for (int i = 0; i < count; ++i)
            for (int tap = 0; tap < 9; ++tap) to[(first + i) * 9 + tap] = g[tap][i];
    }
}

// A range of rows of tiles, and a range of outputs.
struct KernelPart {
    std::int64_t first_row, last_row;
    int first, last;

    int outputs() const { return last - first; }
};

// Gradients of some outputs' kernels at all points, [outputs, inputs] each, summed over some rows of tiles,
// of which there must be at least one; `length` rows of tiles are taken at a time.
inline void gradient_at_points(const Inputs& x, const Call& call, int inputs, const KernelPart& part,
                               std::int64_t length, float* out) {
    const TileRows<2> rows(call.maps);
    const int outputs = part.outputs(), lanes = best_lanes(), padded = Panels::padded(inputs, 2 * lanes);
    for (std::int64_t first = part.first_row; first < part.last_row; first += length) {
        const Stretch on = rows.stretch(call, first, std::min(first + length, part.last_row));
        const float* const* const gradients = rows_of_condition(0, on);
        for (const float*& row : on.scratch.condition) row += part.first;
        find_tiles<2>(inputs, outputs, x, on, nullptr, gradients);
        const int count = static_cast<int>(on.scratch.tiles.size());
        const std::ptrdiff_t panel = std::ptrdiff_t{count} * padded, row = std::ptrdiff_t{count} * outputs;
        float* const panels = on.scratch.points[0].at_least(TileSizes<2>::points * panel);
        float* const columns = on.scratch.points[1].at_least(TileSizes<2>::points * row);
        enter_both(on.scratch.tiles, inputs, outputs, lanes, panels, columns);
        for (int point = 0; point < TileSizes<2>::points; ++point) {
            const Columns from{columns + point * row, outputs};
            const Panels weights{panels + point * panel, nullptr, inputs, count, 2 * lanes};
            float* const to = out + std::ptrdiff_t{point} * outputs * inputs;
            if (first == part.first_row)
                multiply(from, outputs, weights, StoreMaps{to, inputs, nullptr, Ending::plain, nullptr});
            else
                multiply(from, outputs, weights, Add{to, inputs, 1.0f});
        }
    }
}

// Gradient [outputs, inputs, 9] of a kernel, from the rows of inputs and of the outputs' gradients. The
// result has the same bits for the same number of threads.
inline void kernel_gradient(const Inputs& x, const Inputs& grad, int inputs, int outputs, const Maps& maps,
                            int threads, float* out) {
    static thread_local Floats memory;
    const TileRows<2> rows(maps);
    if (rows.count == 0) {
        std::fill_n(out, std::int64_t{9} * outputs * inputs, 0.0f);
        return;
    }
    const Condition gradients{grad.data, maps.images, static_cast<int>(grad.stride)};
    const Call call{maps, threads, &gradients};
    constexpr std::int64_t together = 128;  // tiles per pass of the sums through memory
    const std::int64_t tiles = rows.count * rows.tiles;
    if (threads > 1 && outputs >= least_rows * threads && tiles <= 2 * outputs) {
        // Few tiles: each thread takes all of them, for the kernels of some outputs.
        team_for(threads, threads, [&](std::int64_t group) {
            const int first = static_cast<int>(outputs * group / threads),
                      last = static_cast<int>(outputs * (group + 1) / threads);
            const std::size_t apart = static_cast<std::size_t>(last - first) * inputs;
            float* const sums = scratch_of_thread().outputs[0].at_least(TileSizes<2>::points * apart);
            gradient_at_points(x, call, inputs, {0, rows.count, first, last}, rows.holding(together), sums);
            for (int o = first; o < last; ++o)
                kernels_from_points(sums + std::ptrdiff_t{o - first} * inputs, apart, inputs,
                                    out + std::ptrdiff_t{o} * inputs * 9);
            rows.free_if_much(together);
        });
        return;
    }
    const int groups = static_cast<int>(std::min<std::int64_t>(rows.count, threads));
    const std::size_t apart = static_cast<std::size_t>(outputs) * inputs, size = TileSizes<2>::points * apart;
    float* const sums = memory.at_least(groups * size);
    team_for(groups, threads, [&](std::int64_t group) {
        gradient_at_points(x, call, inputs,
                           {rows.count * group / groups, rows.count * (group + 1) / groups, 0, outputs},
                           rows.holding(together), sums + group * size);
        rows.free_if_much(together);
    });
    team_for(outputs, threads, [&](std::int64_t output) {
        const std::size_t first = static_cast<std::size_t>(output) * inputs;
        for (int group = 1; group < groups; ++group)
            for (int point = 0; point < TileSizes<2>::points; ++point) {
                float* const to = sums + point * apart + first;
                for (int i = 0; i < inputs; ++i) to[i] += to[group * size + i];
            }
        kernels_from_points(sums + first, apart, inputs, out + first * 9);
    });
}

}  // namespace usf
#endif
