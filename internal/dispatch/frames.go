package dispatch

import "crypto/rand"

// frameTracker follows WebSocket frames (RFC 6455) in a stream of bytes, only
// so far as to know where one ends: between two frames a control frame may be
// put in, also in the middle of a message in fragments.
type frameTracker struct {
	masked bool // the frames made here carry a mask, as those of a client must

	head [14]byte
	have int    // bytes of the header seen
	left uint64 // bytes of payload to come
	shut bool   // a close frame went by
}

// boundary tells whether a frame may begin here.
func (f *frameTracker) boundary() bool { return f.have == 0 && f.left == 0 && !f.shut }

// follow takes all of p.
func (f *frameTracker) follow(p []byte) {
	for len(p) > 0 {
		n := f.step(p)
		p = p[n:]
	}
}

// untilBoundary takes p up to the first boundary in it, and tells how much
// that is.
func (f *frameTracker) untilBoundary(p []byte) int {
	n := 0
	for n < len(p) && !f.boundary() {
		n += f.step(p[n:])
	}
	return n
}

// step takes the next piece: a byte of a header, or payload.
func (f *frameTracker) step(p []byte) int {
	if f.left > 0 {
		n := min(uint64(len(p)), f.left)
		f.left -= n
		return int(n)
	}
	f.head[f.have] = p[0]
	f.have++
	if f.have < 2 {
		return 1
	}
	size := 2
	switch f.head[1] & 0x7f {
	case 126:
		size += 2
	case 127:
		size += 8
	}
	lengthEnd := size
	if f.head[1]&0x80 != 0 {
		size += 4
	}
	if f.have < size {
		return 1
	}
	switch lengthEnd {
	case 2:
		f.left = uint64(f.head[1] & 0x7f)
	default:
		for _, b := range f.head[2:lengthEnd] {
			f.left = f.left<<8 | uint64(b)
		}
	}
	if f.head[0]&0x0f == 8 {
		f.shut = true
	}
	f.have = 0
	return 1
}

// goingAway makes a close frame with status 1001.
func (f *frameTracker) goingAway() []byte {
	const status = 1001
	payload := []byte{status >> 8, status & 0xff}
	if !f.masked {
		return append([]byte{0x88, 2}, payload...)
	}
	frame := []byte{0x88, 0x80 | 2, 0, 0, 0, 0}
	_, _ = rand.Read(frame[2:6])
	for i, b := range payload {
		frame = append(frame, b^frame[2+i])
	}
	return frame
}
