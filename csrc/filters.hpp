// A 3 x 3 convolution's kernel, filtered by the tiles that take less time on the maps at hand.
#pragma once

#include <algorithm>
#include <cstddef>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "call.hpp"
#include "winograd.hpp"

#ifdef USF_PRODUCTS

namespace usf {

// Tiles have 2 x 2 or 4 x 4 outputs; kernels for both are made when they are first used. Copies of this share
// them. With `pairs`, which the processor must be able to multiply, tiles are small: bfloat16 has too few
// digits for large ones.
class Filters {
public:
    // The matrix is [outputs, 9 * inputs], one tap after the other.
    Filters(const float* matrix, const float* bias, int outputs, int inputs, bool pairs)
        : shared_(std::make_shared<Shared>()) {
        shared_->matrix.assign(matrix, matrix + std::ptrdiff_t{9} * outputs * inputs);
        if (bias) shared_->bias.assign(bias, bias + outputs);
        shared_->outputs = outputs, shared_->inputs = inputs, shared_->pairs = pairs;
    }
    int outputs() const { return shared_->outputs; }
    bool pairs() const { return shared_->pairs; }

    // Calls body(winograd).
    template <class Body>
    void visit(const Maps& maps, Body&& body) const {
        if (!pairs() && large_tiles_pay(shared_->kernel(), maps))
            body(shared_->large.of(*shared_));
        else
            body(shared_->small.of(*shared_));
    }

    // Whether large tiles take less time than small ones. Not for a few channels, where their transforms take
    // what they save, or a few tiles only, each of which would read 36 matrices instead of 16. Of the maps,
    // their size alone decides, so that an image's results do not depend on the batch that it is in.
    static bool large_tiles_pay(const Kernel& kernel, const Maps& maps) {
        constexpr int fewest_channels = 32, fewest_tiles = 9;
        const auto tiles = [&](int side) {
            return (maps.height + side - 1) / side * ((maps.width + side - 1) / side);
        };
        return std::min(kernel.outputs, kernel.inputs) >= fewest_channels && tiles(4) >= fewest_tiles &&
               tiles(4) * TileSizes<4>::points < tiles(2) * TileSizes<2>::points;
    }

private:
    struct Shared;
    template <int side>
    struct Made {
        std::once_flag once;
        std::optional<Winograd<side>> winograd;

        const Winograd<side>& of(const Shared& all) {
            std::call_once(once, [&] {
                Winograd<side> made(all.kernel(), all.bias.empty() ? nullptr : all.bias.data());
                winograd.emplace(all.pairs ? made.in_pairs() : std::move(made));
            });
            return *winograd;
        }
    };
    struct Shared {
        std::vector<float> matrix, bias;
        int outputs, inputs;
        bool pairs;
        Made<2> small;
        Made<4> large;

        Kernel kernel() const {
            return {matrix.data(), outputs, inputs, std::ptrdiff_t{9} * inputs, 1, inputs};
        }
    };
    std::shared_ptr<Shared> shared_;
};

}  // namespace usf
#endif
