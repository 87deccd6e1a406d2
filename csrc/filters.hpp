// A 3 x 3 convolution's kernel, filtered by the tiles that take less time on the maps at hand.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "call.hpp"
#include "tile_rows.hpp"
#include "winograd.hpp"

#ifdef USF_PRODUCTS

namespace usf {

// Tiles have 2 x 2 or 4 x 4 outputs. A kernel at the points of each is made when it is first used, and kept,
// as is the kernel itself. Copies of this share all. With `pairs`, which the processor must be able to
// multiply, tiles are small: bfloat16 has too few digits for large ones.
class Filters {
public:
    // The matrix is [outputs, 9 * inputs], one tap after the other.
    Filters(const float* matrix, const float* bias, int outputs, int inputs, bool pairs)
        : shared_(std::make_shared<Shared>()) {
        shared_->matrix.assign(matrix, matrix + std::ptrdiff_t{9} * outputs * inputs);
        if (bias) shared_->bias.assign(bias, bias + outputs);
        shared_->outputs = outputs, shared_->inputs = inputs, shared_->pairs = pairs;
        if (!pairs) return;
        shared_->two.of(*shared_, 1);
        shared_->matrix = {};
    }
    int outputs() const { return shared_->outputs; }
    int inputs() const { return shared_->inputs; }
    bool pairs() const { return shared_->pairs; }

    // Calls body(winograd). Of the maps, their size alone decides which, so that an image's results do not
    // depend on the batch that it is in. The first call for a kind must not come from a member of a team.
    template <class Body>
    void visit(const Call& call, Body&& body) const {
        if (!pairs() && large_tiles_pay(shared_->kernel(), call.maps))
            body(shared_->four.of(*shared_, call.threads));
        else
            body(shared_->two.of(*shared_, call.threads));
    }

    // Whether large tiles take less time than small ones. Not for a few channels, where their transforms take
    // what they save, or a few tiles of a map only, each of which would read 36 matrices instead of 16.
    static bool large_tiles_pay(const Kernel& kernel, const Maps& maps) {
        constexpr int fewest_tiles = 9;
        const std::int64_t large = TileRows<4>(maps).tiles_of_map(), small = TileRows<2>(maps).tiles_of_map();
        return std::min(kernel.outputs, kernel.inputs) >= fewest_of_large && large >= fewest_tiles &&
               large * TileSizes<4>::points < small * TileSizes<2>::points;
    }

private:
    struct Shared;
    template <int side>
    struct Made {
        std::once_flag once;
        std::optional<Winograd<side>> winograd;

        const Winograd<side>& of(const Shared& all, int threads) {
            std::call_once(once, [&] {
                Winograd<side> made(all.kernel(), all.bias.empty() ? nullptr : all.bias.data(), threads);
                winograd.emplace(all.pairs ? made.in_pairs() : std::move(made));
            });
            return *winograd;
        }
    };
    struct Shared {
        std::vector<float> matrix, bias;
        int outputs, inputs;
        bool pairs;
        Made<2> two;
        Made<4> four;

        Kernel kernel() const {
            return {matrix.data(), outputs, inputs, std::ptrdiff_t{9} * inputs, 1, inputs};
        }
    };
    std::shared_ptr<Shared> shared_;
};

}  // namespace usf
#endif
