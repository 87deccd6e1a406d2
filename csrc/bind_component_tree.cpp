#include <bit>
#include <limits>
#include <span>
#include <type_traits>
#include <vector>

#include "bindings.hpp"
#include "max_tree.hpp"

namespace usf {

// Shapes, dtypes and finiteness are checked by the caller.
template <class T, std::size_t rank>
using Image = nb::ndarray<const T, nb::ndim<rank>, nb::c_contig, nb::device::cpu>;

// Converts a tree to (parent, level, node), arrays that own their memory.
template <class T>
nb::tuple to_python(ComponentTree<T>& tree) {
    const auto size = static_cast<std::size_t>(tree.size);
    return nb::make_tuple(to_numpy(tree.parent.release(), {size}), to_numpy(tree.level.release(), {size}),
                          to_numpy(tree.node.release(), {static_cast<std::size_t>(tree.height),
                                                         static_cast<std::size_t>(tree.width)}));
}

// The same with views of memory that `owner` frees.
template <class T>
nb::tuple to_python(ComponentTree<T>& tree, nb::capsule owner) {
    const auto size = static_cast<std::size_t>(tree.size), height = static_cast<std::size_t>(tree.height),
               width = static_cast<std::size_t>(tree.width);
    return nb::make_tuple(nb::ndarray<nb::numpy, std::int32_t>(tree.parent.data(), {size}, owner),
                          nb::ndarray<nb::numpy, T>(tree.level.data(), {size}, owner),
                          nb::ndarray<nb::numpy, std::int32_t>(tree.node.data(), {height, width}, owner));
}

// Lets small trees of `pixels` pixels share one block, and returns it. With a block for each, page faults of
// fresh memory would take up to a third of the time, and threads would wait for each other in them.
template <class T>
Memory<std::byte> share_block(std::vector<ComponentTree<T>>& trees, std::size_t pixels) {
    constexpr std::size_t line = 64;
    const std::size_t bytes = pixels * (2 * sizeof(std::int32_t) + sizeof(T));
    const std::size_t stride = (bytes + line - 1) / line * line;
    Memory<std::byte> block = allocate<std::byte>(stride * trees.size(), Allocated::again_and_again);
    for (std::size_t i = 0; i < trees.size(); ++i) {
        std::byte* memory = block.get() + i * stride;
        const auto take = [&]<class Item>(Buffer<Item>& buffer) {
            buffer.borrow(reinterpret_cast<Item*>(memory), pixels);
            memory += pixels * sizeof(Item);
        };
        take(trees[i].parent);
        take(trees[i].node);
        take(trees[i].level);
    }
    return block;
}

template <class T>
nb::tuple component_tree(Image<T, 2> image, int connectivity, int threads) {
    ComponentTree<T> tree;
    {
        nb::gil_scoped_release unlocked;
        MaxTreeBuilder<T>().build(image.data(), image.shape(0), image.shape(1),
                                  static_cast<Connectivity>(connectivity), threads, tree);
    }
    return to_python(tree);
}

template <class T>
nb::list component_trees(Image<T, 3> images, int connectivity, int threads) {
    const auto batch = static_cast<std::int64_t>(images.shape(0));
    const auto height = static_cast<std::int64_t>(images.shape(1)),
               width = static_cast<std::int64_t>(images.shape(2));
    std::vector<ComponentTree<T>> trees(batch);
    const std::size_t pixels = images.shape(1) * images.shape(2);
    const bool small = pixels * sizeof(std::int32_t) < large_block;
    Memory<std::byte> block;
    if (small) block = share_block(trees, pixels);
    {
        nb::gil_scoped_release unlocked;
        std::vector<MaxTreeBuilder<T>> builders(workers_for(batch, threads));
        parallel_for(batch, threads, [&](int worker, std::int64_t i) {
            builders[worker].build(images.data() + i * height * width, height, width,
                                   static_cast<Connectivity>(connectivity), 1, trees[i]);
        });
    }
    nb::list result;
    if (small) {
        const nb::capsule owner = to_owner(std::move(block));
        for (ComponentTree<T>& tree : trees) result.append(to_python(tree, owner));
    } else {
        for (ComponentTree<T>& tree : trees) result.append(to_python(tree));
    }
    return result;
}

template <class T>
bool all_finite(nb::ndarray<const T, nb::c_contig, nb::device::cpu> values) {
    using Bits = std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint64_t>;
    // If all bits of the exponent are set, adding 1 in its last place carries into the sign.
    constexpr Bits sign = ~(~Bits(0) >> 1), one = Bits(1) << (std::numeric_limits<T>::digits - 1);
    Bits carried = 0;
    for (const T value : std::span(values.data(), values.size()))
        carried |= (std::bit_cast<Bits>(value) & ~sign) + one;
    return (carried & sign) == 0;
}

template <class T>
void bind_level_type(nb::module_& m) {
    using namespace nb::literals;
    m.def("component_tree", &component_tree<T>, "image"_a.noconvert(), "connectivity"_a, "threads"_a);
    m.def("component_trees", &component_trees<T>, "images"_a.noconvert(), "connectivity"_a, "threads"_a);
}

void bind_component_tree(nb::module_& m) {
    bind_level_type<float>(m);
    bind_level_type<double>(m);
    bind_level_type<std::uint8_t>(m);
    bind_level_type<std::uint16_t>(m);
    m.def("all_finite", &all_finite<float>, nb::arg("values").noconvert());
    m.def("all_finite", &all_finite<double>, nb::arg("values").noconvert());
}

}  // namespace usf
