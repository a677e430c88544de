package criu

import (
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"testing"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/fown"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/memfd"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/mm"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/pagemap"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/vma"
	"google.golang.org/protobuf/proto"
)

const page = 4096

// sharing writes the images of a process that maps a piece of memory, which has
// these pages (offset, number), and an ordinary file.
func sharing(t *testing.T, inode *memfd.MemfdInodeEntry, entries ...*pagemap.PagemapEntry) string {
	t.Helper()
	dir := t.TempDir()
	inode.Uid, inode.Gid, inode.Seals, inode.InodeId, inode.Shmid = new(uint32(0)), new(uint32(0)), new(uint32(1)), new(uint64(4)), new(uint32(77))
	write(t, dir+"/memfd.img", []uint32{imageMagic, memfdMagic}, inode)
	nobody := &fown.FownEntry{Uid: new(uint32(0)), Euid: new(uint32(0)), Signum: new(uint32(0)), PidType: new(uint32(0)), Pid: new(uint32(0))}
	write(t, dir+"/files.img", []uint32{imageMagic, filesMagic},
		&fdinfo.FileEntry{Type: new(fdinfo.FdTypes_MEMFD), Id: new(uint32(9)), Memfd: &memfd.MemfdFileEntry{Id: new(uint32(9)), Flags: new(uint32(2)), Pos: new(uint64(0)), Fown: nobody, InodeId: new(uint32(4))}},
		&fdinfo.FileEntry{Type: new(fdinfo.FdTypes_PIPE), Id: new(uint32(10))})
	area := func(status uint32, shmid uint64) *vma.VmaEntry {
		return &vma.VmaEntry{Start: new(uint64(page)), End: new(uint64(2 * page)), Pgoff: new(uint64(0)), Shmid: &shmid, Prot: new(uint32(3)), Flags: new(uint32(1)), Status: &status, Fd: new(int64(-1))}
	}
	writeMappings(t, dir, area(0x4081, 9), area(0x81, 9), area(0x4081, 12), area(0x201, 0))
	writePagemap(t, dir+"/pagemap-shmem-77.img", 3, entries)
	return dir
}

// writeMappings writes the image of a process's memory.
func writeMappings(t *testing.T, dir string, all ...*vma.VmaEntry) {
	t.Helper()
	zero := new(uint64(0))
	write(t, dir+"/mm-1.img", []uint32{imageMagic, mmMagic}, &mm.MmEntry{
		MmStartCode: zero, MmEndCode: zero, MmStartData: zero, MmEndData: zero, MmStartStack: zero, MmStartBrk: zero, MmBrk: zero,
		MmArgStart: zero, MmArgEnd: zero, MmEnvStart: zero, MmEnvEnd: zero, ExeFileId: new(uint32(1)), Vmas: all,
	})
}

// mappings are those of that image.
func mappings(t *testing.T, dir string) (all []*vma.VmaEntry) {
	t.Helper()
	err := edit(dir+"/mm-1.img", mmMagic, look(func(e *mm.MmEntry) error {
		all = e.Vmas
		return nil
	}))
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// writePagemap writes where some memory has content, which is in an image of that number.
func writePagemap(t *testing.T, name string, pages uint32, entries []*pagemap.PagemapEntry) {
	t.Helper()
	all := []proto.Message{&pagemap.PagemapHead{PagesId: &pages}}
	for _, e := range entries {
		e.CompatNrPages = new(uint32(0))
		all = append(all, e)
	}
	write(t, name, []uint32{imageMagic, pagemapMagic}, all...)
}

func present(at, pages uint64) *pagemap.PagemapEntry {
	return &pagemap.PagemapEntry{Vaddr: new(at * page), NrPages: &pages, Flags: new(uint32(pagePresent))}
}

func statuses(t *testing.T, dir string) (all []uint32) {
	t.Helper()
	for _, v := range mappings(t, dir) {
		all = append(all, v.GetStatus())
	}
	return all
}

func TestTakeShared(t *testing.T) {
	const size = 1024 * page
	inode := func() *memfd.MemfdInodeEntry {
		return &memfd.MemfdInodeEntry{Name: new(anonymous), Size: new(uint64(size))}
	}
	var scattered []*pagemap.PagemapEntry
	for i := range uint64(mostParts + 1) {
		scattered = append(scattered, present(8*i, 6))
	}
	for name, c := range map[string]struct {
		inode   *memfd.MemfdInodeEntry
		entries []*pagemap.PagemapEntry
		want    []Shared
		fails   bool
	}{
		"in two places": {inode(), []*pagemap.PagemapEntry{present(0, 256), present(256, 10), {Vaddr: new(uint64(300 * page)), NrPages: new(uint64(5)), Flags: new(uint32(0))}, present(1000, 24)},
			[]Shared{{Name: "shared-4", Size: size, Pages: "pages-3.img", Parts: []Part{{0, 266 * page}, {1000 * page, 24 * page}}}}, false},
		"small":                  {inode(), []*pagemap.PagemapEntry{present(0, 255)}, nil, false},
		"in too many places":     {inode(), scattered, nil, false},
		"a file with a name":     {&memfd.MemfdInodeEntry{Name: new("memfd:x"), Size: new(uint64(size))}, []*pagemap.PagemapEntry{present(0, 256)}, nil, false},
		"of huge pages":          {&memfd.MemfdInodeEntry{Name: new(anonymous), Size: new(uint64(size)), HugetlbFlag: new(uint32(1))}, []*pagemap.PagemapEntry{present(0, 256)}, nil, false},
		"more than there is":     {inode(), []*pagemap.PagemapEntry{present(1000, 25)}, nil, true},
		"beyond all":             {inode(), []*pagemap.PagemapEntry{present(1<<51, 1<<51)}, nil, true},
		"far too large for real": {&memfd.MemfdInodeEntry{Name: new(anonymous), Size: new(^uint64(0))}, []*pagemap.PagemapEntry{present(0, 256)}, nil, true},
	} {
		t.Run(name, func(t *testing.T) {
			dir := sharing(t, c.inode, c.entries...)
			before := statuses(t, dir)
			got, err := TakeShared(dir)
			if (err != nil) != c.fails || !reflect.DeepEqual(got, c.want) {
				t.Fatalf("got %+v, %v, want %+v", got, err, c.want)
			}
			if c.want != nil {
				before[0] = 0x81 // the memory's own mapping, and no other
			}
			if after := statuses(t, dir); !reflect.DeepEqual(after, before) {
				t.Errorf("mappings are %x, want %x", after, before)
			}
			var files []string
			err = edit(dir+"/files.img", filesMagic, func(b []byte) ([]byte, error) {
				e := &fdinfo.FileEntry{}
				err := proto.Unmarshal(b, e)
				files = append(files, fmt.Sprint(e.GetType(), e.GetId(), e.GetReg().GetName()))
				return b, err
			})
			want := []string{"MEMFD 9", "PIPE 10"}
			if c.want != nil {
				want[0] = "REG 9/shared-4"
			}
			if err != nil || !reflect.DeepEqual(files, want) {
				t.Errorf("files are %q, %v, want %q", files, err, want)
			}
		})
	}
}

// A file of memory that a process has open, or that is on its way to one, stays
// what it is, whatever it is called.
func TestTakeShared_NotWhatIsOpen(t *testing.T) {
	for name, more := range map[string]func(t *testing.T, dir string){
		"open": func(t *testing.T, dir string) {
			write(t, dir+"/fdinfo-3.img", []uint32{imageMagic, fdinfoMagic}, &fdinfo.FdinfoEntry{Id: new(uint32(9)), Flags: new(uint32(0)), Type: new(fdinfo.FdTypes_MEMFD), Fd: new(uint32(5))})
		},
		"on its way": func(t *testing.T, dir string) { write(t, dir+"/sk-queues.img", []uint32{imageMagic, 1}) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := sharing(t, &memfd.MemfdInodeEntry{Name: new(anonymous), Size: new(uint64(1024 * page))}, present(0, 256))
			more(t, dir)
			if got, err := TakeShared(dir); got != nil || err != nil {
				t.Errorf("taken: %+v, %v", got, err)
			}
		})
	}
}

func TestTakeShared_LargePartsAreSeveral(t *testing.T) {
	const pages = 3 * mostPart / page
	dir := sharing(t, &memfd.MemfdInodeEntry{Name: new(anonymous), Size: new(uint64(pages * page))}, present(0, pages/3), present(pages/3, pages/3), present(2*pages/3, pages/3))
	got, err := TakeShared(dir)
	if want := []Part{{0, mostPart}, {mostPart, mostPart}, {2 * mostPart, mostPart}}; err != nil || len(got) != 1 || !reflect.DeepEqual(got[0].Parts, want) {
		t.Errorf("got %+v, %v, want %v", got, err, want)
	}
}

func TestTakeShared_ThereIsNone(t *testing.T) {
	if got, err := TakeShared(t.TempDir()); got != nil || err != nil {
		t.Errorf("got %v, %v", got, err)
	}
}

func TestShared_OpenWantsAllOfIt(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "pages-1.img"), make([]byte, 2*page), 0o600); err != nil {
		t.Fatal(err)
	}
	whole := Shared{Size: 8 * page, Pages: "pages-1.img", Parts: []Part{{0, page}, {4 * page, page}}}
	f, err := whole.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	_ = f.Close()
	for name, s := range map[string]Shared{
		"too short": {Size: 8 * page, Pages: "pages-1.img", Parts: []Part{{0, 3 * page}}},
		"gone":      {Size: 8 * page, Pages: "pages-2.img", Parts: []Part{{0, 2 * page}}},
		"elsewhere": {Size: 8 * page, Pages: "../pages-1.img", Parts: []Part{{0, 2 * page}}},
		"negative":  {Size: -1, Pages: "pages-1.img", Parts: []Part{{0, 2 * page}}},
	} {
		if f, err := s.Open(dir); err == nil {
			_ = f.Close()
			t.Errorf("%s: it is opened", name)
		}
	}
}
