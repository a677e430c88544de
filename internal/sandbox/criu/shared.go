package criu

import (
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/memfd"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/mm"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/pagemap"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/regfile"
	"google.golang.org/protobuf/proto"
)

const (
	fdinfoMagic  = 0x56213732
	memfdMagic   = 0x48453499
	mmMagic      = 0x57492820
	pagemapMagic = 0x56084025
)

const (
	// anonymous is the name that the kernel has for shared memory without one.
	anonymous = "/dev/zero"
	// What an image says of a mapping of it (CRIU's VMA_AREA_MEMFD), and of pages
	// that have content (PE_PRESENT).
	ofMemory    = 1 << 14
	pagePresent = 1 << 2
)

// Shared is memory that processes of an image share. It is restored as a file
// of memory, which is handed to CRIU as an open file of that name.
type Shared struct {
	Name string `json:"name"`
	Size int64  `json:"size"`
	// Pages is the image that holds its content: that of each part in turn.
	Pages string `json:"pages"`
	Parts []Part `json:"parts"`
}

// Part of shared memory that has content.
type Part struct {
	Offset int64 `json:"offset"`
	Length int64 `json:"length"`
}

const (
	// leastShared is worth the work, in bytes.
	leastShared = 1 << 20
	// mostParts fit on a tape; a part is what one sendfile(2) copies at most.
	mostParts = 64
	mostPart  = 1 << 30
	// mostShared bounds the descriptors that a restore takes.
	mostShared = 16
)

// TakeShared takes the larger pieces of anonymous shared memory out of an
// image's processes: for CRIU, each becomes an ordinary file that they map.
//
// CRIU fills shared memory through the mapping of a process that it restores, so each
// page is a fault: 14 to 45 ms for the 19 MB of PHP's opcache with WordPress in it. To write a
// file takes less, and goes on beside.
func TakeShared(dir string) ([]Shared, error) {
	inodes, files := filepath.Join(dir, "memfd.img"), filepath.Join(dir, "files.img")
	if _, err := os.Stat(inodes); errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	used, err := memoryInUse(dir, files)
	if err != nil {
		return nil, err
	}
	var all []Shared
	names := map[uint32]string{} // by CRIU's number of the memory
	err = edit(inodes, memfdMagic, look(func(e *memfd.MemfdInodeEntry) error {
		if e.GetName() != anonymous || e.GetHugetlbFlag() != 0 || e.GetInodeId() > math.MaxUint32 || used[e.GetInodeId()] {
			return nil
		}
		s, err := readShared(dir, e.GetShmid(), e.GetSize())
		if err == nil && s.Length() >= leastShared && len(s.Parts) <= mostParts && len(all) < mostShared {
			id := uint32(e.GetInodeId()) //nolint:gosec // checked
			s.Name = fmt.Sprintf("shared-%x", id)
			names[id] = s.Name
			all = append(all, s)
		}
		return err
	}))
	if err != nil || all == nil {
		return nil, err
	}
	taken := map[uint64]bool{} // numbers of files
	err = edit(files, filesMagic, change(func(e *fdinfo.FileEntry) error {
		name, ok := names[e.GetMemfd().GetInodeId()]
		if e.GetType() != fdinfo.FdTypes_MEMFD || !ok {
			return nil
		}
		taken[uint64(e.GetId())] = true
		m := e.Memfd
		e.Type, e.Memfd = new(fdinfo.FdTypes_REG), nil
		e.Reg = &regfile.RegFileEntry{Id: m.Id, Flags: m.Flags, Pos: m.Pos, Fown: m.Fown, Name: new("/" + name)}
		return nil
	}))
	if err != nil {
		return nil, err
	}
	return all, editAll(dir, "mm-", mmMagic, change(func(e *mm.MmEntry) error {
		for _, v := range e.Vmas {
			if v.GetStatus()&ofMemory != 0 && taken[v.GetShmid()] {
				v.Status = new(v.GetStatus() &^ ofMemory)
			}
		}
		return nil
	}))
}

// memoryInUse are the files of memory that a process has open, by CRIU's
// numbers of them: a program may call one as the kernel calls memory without a
// name. One may be on its way from one to another, too: then it is all of them.
func memoryInUse(dir, files string) (map[uint64]bool, error) {
	open := map[uint32]bool{}
	err := editAll(dir, "fdinfo-", fdinfoMagic, look(func(e *fdinfo.FdinfoEntry) error {
		open[e.GetId()] = true
		return nil
	}))
	if err != nil {
		return nil, err
	}
	_, err = os.Stat(filepath.Join(dir, "sk-queues.img"))
	onTheWay := !errors.Is(err, os.ErrNotExist)
	used := map[uint64]bool{}
	return used, edit(files, filesMagic, look(func(e *fdinfo.FileEntry) error {
		if m := e.GetMemfd(); m != nil && (open[e.GetId()] || onTheWay) {
			used[uint64(m.GetInodeId())] = true
		}
		return nil
	}))
}

// readShared finds out what a piece of shared memory holds.
func readShared(dir string, id uint32, size uint64) (s Shared, err error) {
	if size > math.MaxInt64/2 {
		return s, errors.New("shared memory is too large")
	}
	s.Size = int64(size)
	pages, runs, err := readPagemap(filepath.Join(dir, fmt.Sprintf("pagemap-shmem-%d.img", id)), size)
	if errors.Is(err, os.ErrNotExist) { // nobody wrote to it
		return s, nil
	}
	s.Pages = fmt.Sprintf("pages-%d.img", pages)
	for _, r := range runs {
		for at := r.start; at < r.end; {
			length := min(r.end-at, mostPart)
			s.Parts = append(s.Parts, Part{int64(at), int64(length)}) //nolint:gosec // checked
			at += length
		}
	}
	return s, err
}

// run is a range of addresses whose pages have content.
type run struct{ start, end uint64 }

// readPagemap reads where memory of a size has content, in order of addresses, and
// the number of the image that holds it.
func readPagemap(name string, size uint64) (pages uint32, runs []run, err error) {
	head, page := true, uint64(os.Getpagesize()) //nolint:gosec // not negative
	err = edit(name, pagemapMagic, func(b []byte) ([]byte, error) {
		if head {
			h := &pagemap.PagemapHead{}
			err := proto.Unmarshal(b, h)
			head, pages = false, h.GetPagesId()
			return b, err
		}
		e := &pagemap.PagemapEntry{}
		if err := proto.Unmarshal(b, e); err != nil || e.GetFlags()&pagePresent == 0 {
			return b, err
		}
		count, start := e.GetNrPages(), e.GetVaddr()
		if count == 0 {
			count = uint64(e.GetCompatNrPages())
		}
		last := uint64(0)
		if len(runs) > 0 {
			last = runs[len(runs)-1].end
		}
		if start < last || start > size || count > (size-start)/page {
			return nil, errors.New("it is damaged")
		}
		if end := start + count*page; start == last && len(runs) > 0 {
			runs[len(runs)-1].end = end
		} else {
			runs = append(runs, run{start, end})
		}
		return b, nil
	})
	return pages, runs, err
}

// Length is how much of it has content.
func (s *Shared) Length() (n int64) {
	for _, p := range s.Parts {
		n += p.Length
	}
	return n
}

// Open opens the content, and checks that all of it is there.
func (s *Shared) Open(dir string) (*os.File, error) {
	if s.Size < 0 || len(s.Parts) > mostParts || s.Pages != filepath.Base(s.Pages) || strings.HasPrefix(s.Pages, ".") {
		return nil, errors.New("shared memory: it is damaged")
	}
	f, err := os.Open(filepath.Join(dir, s.Pages)) //nolint:gosec // ours
	if err != nil {
		return nil, fmt.Errorf("read shared memory: %w", err)
	}
	if info, err := f.Stat(); err != nil || info.Size() != s.Length() {
		return nil, errors.Join(errors.New("shared memory: it is damaged"), err, f.Close())
	}
	return f, nil
}
