package criu

import (
	"errors"
	"math"
	"os"
	"path/filepath"
	"slices"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/mm"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/vma"
	"golang.org/x/sys/unix"
)

// What an image says of a mapping of private memory without a file: CRIU's
// VMA_AREA_REGULAR and VMA_ANON_PRIVATE.
const ofProcess = 1<<0 | 1<<9

// Populate has the kernel make the memory of an image's processes together with
// the mapping, wherever nearly all of a mapping has content: CRIU passes
// MAP_POPULATE on.
//
// CRIU copies the content in, so otherwise each page is a fault: a quarter of the
// processor time of restoring a Node.js app. What has no content is
// zeroes either way, but is held from the beginning: at most a page in 16.
func Populate(dir string) error {
	processes, err := images(dir, "mm-")
	if err != nil {
		return err
	}
	for _, p := range processes {
		_, runs, err := readPagemap(filepath.Join(dir, "pagemap-"+p), math.MaxUint64)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err == nil {
			err = edit(filepath.Join(dir, "mm-"+p), mmMagic, change(func(m *mm.MmEntry) error {
				for _, v := range m.Vmas {
					if dense(v, runs) {
						v.Flags = new(v.GetFlags() | unix.MAP_POPULATE)
					}
				}
				return nil
			}))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// dense tells whether a mapping is the process's own memory and nearly full.
func dense(v *vma.VmaEntry, runs []run) bool {
	if v.GetStatus()&ofProcess != ofProcess || v.GetFlags()&(unix.MAP_GROWSDOWN|unix.MAP_HUGETLB) != 0 || v.GetEnd() <= v.GetStart() {
		return false
	}
	first, _ := slices.BinarySearchFunc(runs, v.GetStart(), func(r run, at uint64) int {
		if r.end <= at {
			return -1
		}
		return 1
	})
	full := uint64(0)
	for _, r := range runs[first:] {
		if r.start >= v.GetEnd() {
			break
		}
		full += min(r.end, v.GetEnd()) - max(r.start, v.GetStart())
	}
	size := v.GetEnd() - v.GetStart()
	return full >= size-size/16
}
