package criu

import (
	"reflect"
	"testing"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/pagemap"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/vma"
	"golang.org/x/sys/unix"
)

// process writes the images of a process with these mappings, all of private
// memory if they do not say something else, whose content is at these pages.
func process(t *testing.T, mappings []*vma.VmaEntry, content ...*pagemap.PagemapEntry) string {
	t.Helper()
	dir, zero := t.TempDir(), new(uint64(0))
	for _, v := range mappings {
		v.Pgoff, v.Shmid, v.Prot, v.Fd = zero, zero, new(uint32(3)), new(int64(-1))
		if v.Status == nil {
			v.Status = new(uint32(ofProcess))
		}
		if v.Flags == nil {
			v.Flags = new(uint32(unix.MAP_PRIVATE | unix.MAP_ANONYMOUS))
		}
	}
	writeMappings(t, dir, mappings...)
	writePagemap(t, dir+"/pagemap-1.img", 1, content)
	return dir
}

func mapping(at, pages uint64) *vma.VmaEntry {
	return &vma.VmaEntry{Start: new(at * page), End: new((at + pages) * page)}
}

func populated(t *testing.T, dir string) (all []bool) {
	t.Helper()
	for _, v := range mappings(t, dir) {
		all = append(all, v.GetFlags()&unix.MAP_POPULATE != 0)
	}
	return all
}

func TestPopulate(t *testing.T) {
	of := func(v *vma.VmaEntry, status, flags uint32) *vma.VmaEntry {
		v.Status, v.Flags = &status, &flags
		return v
	}
	const own = unix.MAP_PRIVATE | unix.MAP_ANONYMOUS
	for name, c := range map[string]struct {
		mappings []*vma.VmaEntry
		content  []*pagemap.PagemapEntry
		want     []bool
	}{
		"full":                    {[]*vma.VmaEntry{mapping(10, 20)}, []*pagemap.PagemapEntry{present(10, 20)}, []bool{true}},
		"empty":                   {[]*vma.VmaEntry{mapping(10, 20)}, nil, []bool{false}},
		"all but one of 16":       {[]*vma.VmaEntry{mapping(0, 16)}, []*pagemap.PagemapEntry{present(0, 7), present(8, 8)}, []bool{true}},
		"all but two of 16":       {[]*vma.VmaEntry{mapping(0, 16)}, []*pagemap.PagemapEntry{present(1, 7), present(9, 7)}, []bool{false}},
		"runs over several":       {[]*vma.VmaEntry{mapping(10, 20), mapping(30, 5), mapping(35, 20)}, []*pagemap.PagemapEntry{present(10, 15), present(25, 10), present(35, 3)}, []bool{true, true, false}},
		"not present":             {[]*vma.VmaEntry{mapping(0, 4)}, []*pagemap.PagemapEntry{{Vaddr: new(uint64(0)), NrPages: new(uint64(4)), Flags: new(uint32(0))}}, []bool{false}},
		"a stack":                 {[]*vma.VmaEntry{of(mapping(0, 4), ofProcess, own|unix.MAP_GROWSDOWN)}, []*pagemap.PagemapEntry{present(0, 4)}, []bool{false}},
		"huge pages":              {[]*vma.VmaEntry{of(mapping(0, 512), ofProcess, own|unix.MAP_HUGETLB)}, []*pagemap.PagemapEntry{present(0, 512)}, []bool{false}},
		"of a file":               {[]*vma.VmaEntry{of(mapping(0, 4), 0x41, unix.MAP_PRIVATE)}, []*pagemap.PagemapEntry{present(0, 4)}, []bool{false}},
		"shared":                  {[]*vma.VmaEntry{of(mapping(0, 4), 0x81, unix.MAP_SHARED)}, []*pagemap.PagemapEntry{present(0, 4)}, []bool{false}},
		"damaged: without extent": {[]*vma.VmaEntry{mapping(4, 0)}, []*pagemap.PagemapEntry{present(0, 8)}, []bool{false}},
	} {
		t.Run(name, func(t *testing.T) {
			dir := process(t, c.mappings, c.content...)
			if err := Populate(dir); err != nil {
				t.Fatal(err)
			}
			if got := populated(t, dir); !reflect.DeepEqual(got, c.want) {
				t.Errorf("populated are %v, want %v", got, c.want)
			}
		})
	}
}

func TestPopulate_Damaged(t *testing.T) {
	for name, content := range map[string][]*pagemap.PagemapEntry{
		"beyond all":   {present(1<<51, 1<<51)},
		"out of order": {present(8, 2), present(4, 2)},
		"twice":        {present(8, 2), present(9, 2)},
	} {
		if err := Populate(process(t, []*vma.VmaEntry{mapping(0, 16)}, content...)); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}
