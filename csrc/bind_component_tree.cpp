#include "bindings.hpp"
#include "component_tree.hpp"

namespace usf {

// (parent, level, node) of a (H, W) map; the shape, dtype and finiteness are checked by the caller.
template <class T>
nb::tuple component_tree(nb::ndarray<const T, nb::ndim<2>, nb::c_contig, nb::device::cpu> image, int connectivity,
                         int threads) {
    ComponentTree<T> tree;
    {
        nb::gil_scoped_release unlocked;
        MaxTreeBuilder<T>().build(image.data(), image.shape(0), image.shape(1),
                                  static_cast<Connectivity>(connectivity), threads, tree);
    }
    const std::size_t n = tree.size;
    return nb::make_tuple(to_numpy(tree.parent.release(), {n}),
                          to_numpy(tree.level.release(), {n}),
                          to_numpy(tree.node.release(),
                                   {image.shape(0), image.shape(1)}));
}

void bind_component_tree(nb::module_& m) {
    using namespace nb::literals;
    m.def("component_tree", &component_tree<float>, "image"_a.noconvert(), "connectivity"_a, "threads"_a);
    m.def("component_tree", &component_tree<double>, "image"_a.noconvert(), "connectivity"_a, "threads"_a);
    m.def("component_tree", &component_tree<std::uint8_t>, "image"_a.noconvert(), "connectivity"_a, "threads"_a);
    m.def("component_tree", &component_tree<std::uint16_t>, "image"_a.noconvert(), "connectivity"_a, "threads"_a);
}

}  // namespace usf
