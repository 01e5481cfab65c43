// Launches of extension.cu, called by extension.cpp: the one side sees no torch header, the other no
// kernel, so that both compile in seconds.
#pragma once
#include <cuda_runtime_api.h>

constexpr int kAotMaxBs = 12000;  // the ends of all requests in less than 48 KB of shared memory

// One launch: every block adds up all extend lengths, then writes its share of the rows; block 0
// writes the total. At most `capacity` rows.
cudaError_t launch_prefix_and_fill(const int* extend, const long long* seq, int bs, int topk, int capacity,
                                   int* expanded, int* clamped, int* total, cudaStream_t stream);

// Fill by finished sums: cu [bs + 1].
cudaError_t launch_fill(const int* extend, const long long* seq, const int* cu, int bs, int topk, int total,
                        int* expanded, int* clamped, cudaStream_t stream);
