// A padded batch by its mask, laid out on the host: what bertfast/packing does with numpy where no
// module was built. A batch of a few thousand tokens takes some microseconds here.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>

#include "bindings/module.h"

namespace bertfast {
namespace {

namespace py = pybind11;

using Numbers = py::array_t<int64_t, py::array::c_style>;

// (rows, length) values in memory, of which those that are not 0 count.
template<class T>
struct Mask {
  const T* values;
  int64_t rows, length;
};

// Calls with the array's values as they are: bool or int64.
template<class Function>
auto with_mask(const py::array& array, Function function) {
  const bool dense = array.ndim() == 2 && (array.flags() & py::array::c_style);
  if (!dense) throw py::value_error("a mask must be a dense array of two dimensions");
  const auto of = [&](auto zero) {
    using T = decltype(zero);
    return Mask<T>{static_cast<const T*>(array.data()), array.shape(0), array.shape(1)};
  };
  if (py::isinstance<py::array_t<bool>>(array)) return function(of(false));
  if (py::isinstance<py::array_t<int64_t>>(array)) return function(of(int64_t{}));
  throw py::type_error("a mask must be of bool or int64");
}

// How many tokens of each row are attended; whether each row's first is; whether another token is
// there that is not the padding.
py::tuple look(const py::array& array, const py::object& ids, int64_t token) {
  const int64_t* id = nullptr;
  if (!ids.is_none()) {
    if (!py::isinstance<Numbers>(ids)) throw py::type_error("ids must be a dense array of int64");
    const auto given = py::reinterpret_borrow<Numbers>(ids);
    if (given.size() != array.size()) throw py::value_error("ids must have the mask's shape");
    id = given.data();
  }
  return with_mask(array, [&](auto mask) {
    Numbers lengths(mask.rows);
    bool begins = true, read = false;
    for (int64_t row = 0; row < mask.rows; ++row) {
      const auto* values = mask.values + row * mask.length;
      int64_t count = 0;
      for (int64_t i = 0; i < mask.length; ++i) count += values[i] != 0;
      if (id && count < mask.length) {
        const int64_t* own = id + row * mask.length;
        for (int64_t i = 0; i < mask.length; ++i) read |= values[i] == 0 && own[i] != token;
      }
      lengths.mutable_data()[row] = count;
      begins &= mask.length > 0 && values[0] != 0;
    }
    return py::make_tuple(lengths, begins, read);
  });
}

// Where each packed token stands in the padded batch, and where in its row; and, if wanted, which
// of them comes back to each place of the padded batch: its own, or its row's first.
Numbers places(const py::array& array, int64_t tokens, bool wants_sources) {
  return with_mask(array, [&](auto mask) {
    Numbers numbers(2 * tokens + (wants_sources ? mask.rows * mask.length : 0));
    int64_t* index = numbers.mutable_data();
    int64_t* columns = index + tokens;
    int64_t* source = columns + tokens;
    int64_t found = 0;
    for (int64_t row = 0; row < mask.rows; ++row) {
      const auto* values = mask.values + row * mask.length;
      const int64_t first = found;
      for (int64_t i = 0; i < mask.length; ++i) {
        const bool attended = values[i] != 0;
        if (attended) {
          if (found == tokens) throw py::value_error("more tokens are attended than was said");
          index[found] = row * mask.length + i;
          columns[found] = i;
        }
        if (wants_sources) *source++ = attended ? found : first;
        found += attended;
      }
    }
    if (found != tokens) throw py::value_error("fewer tokens are attended than was said");
    return numbers;
  });
}

// (tiles, 3): sequence, first position in it, number of sequences. A group of sequences that fit
// one tile together shares it; a longer sequence has tiles of its own.
Numbers tiles(const Numbers& bounds, int64_t tile) {
  if (bounds.ndim() != 1 || bounds.size() < 1 || tile < 1) {
    throw py::value_error("bounds and a size of tiles were expected");
  }
  const int64_t count = bounds.size() - 1;
  const int64_t* bound = bounds.data();
  const auto each = [&](auto take) {
    int64_t number = 0;
    for (int64_t start = 0, after; start < count; start = after) {
      after = start + 1;
      while (after < count && bound[after + 1] - bound[start] <= tile) ++after;
      for (int64_t at = 0; at < bound[after] - bound[start]; at += tile) {
        take(number++, start, at, after - start);
      }
    }
    return number;
  };
  const int64_t all = each([](int64_t, int64_t, int64_t, int64_t) {});
  Numbers made({all, int64_t{3}});
  int64_t* to = made.mutable_data();
  each([&](int64_t number, int64_t start, int64_t at, int64_t together) {
    to[3 * number] = start;
    to[3 * number + 1] = at;
    to[3 * number + 2] = together;
  });
  return made;
}

const Binding binding([](py::module_& m) {
  m.def("look", &look, py::arg("mask"), py::arg("ids").none(true), py::arg("token"));
  m.def("places", &places, py::arg("mask"), py::arg("tokens"), py::arg("wants_sources"));
  m.def("tiles", &tiles, py::arg("bounds").noconvert(), py::arg("tile"));
});

}  // namespace
}  // namespace bertfast
