// What main() runs, a file each.
#pragma once

namespace memory {

void convolutions();  // direct ones, also with a joined convolution
void winograd();
void gradients();     // in the input and in the weight
void blocks();
void programs();  // of several sections
void passes();
void pooling();
void teams();
void arithmetic();  // sizes and indices, without running a kernel

}  // namespace memory
