package linux

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// legacyLZ4 begins the frame that the kernel's build makes: blocks of at most 8 MiB,
// each after its packed size, and at the end the unpacked size of all.
var legacyLZ4 = []byte{0x02, 0x21, 0x4c, 0x18}

const legacyBlock = 8 << 20

func unpackLZ4(packed []byte, most int) ([]byte, error) {
	size := int64(binary.LittleEndian.Uint32(packed[len(packed)-4:])) // or a part of a block
	out := make([]byte, 0, min(size, int64(len(packed))*255, int64(most)))
	packed = packed[len(legacyLZ4):]
	for len(packed) > 4 {
		n := int64(binary.LittleEndian.Uint32(packed))
		packed = packed[4:]
		if n > int64(len(packed)) {
			return nil, fmt.Errorf("lz4: a block of %d bytes where %d are left", n, len(packed))
		}
		var err error
		if out, err = unpackBlock(out, packed[:n], min(most, len(out)+legacyBlock)); err != nil {
			return nil, err
		}
		packed = packed[n:]
	}
	if len(packed) == 4 {
		if want := binary.LittleEndian.Uint32(packed); int64(want) != int64(len(out)) {
			return nil, fmt.Errorf("lz4: %d bytes, want %d", len(out), want)
		}
	}
	return out, nil
}

var errLZ4 = errors.New("lz4: a block that ends too early or refers to what is not there")

// unpackBlock appends one block (lz4_Block_format.md) to out, which has at most
// `most` bytes then.
func unpackBlock(out, in []byte, most int) ([]byte, error) {
	first := len(out)
	for len(in) > 0 {
		token := in[0]
		in = in[1:]
		literals, in2, ok := length(int(token>>4), in)
		if !ok || literals > len(in2) {
			return nil, errLZ4
		}
		if len(out)+literals > most {
			return nil, fmt.Errorf("lz4: more than %d bytes", most)
		}
		out = append(out, in2[:literals]...)
		in = in2[literals:]
		if len(in) == 0 {
			return out, nil // the last sequence has literals only
		}
		if len(in) < 2 {
			return nil, errLZ4
		}
		back := int(binary.LittleEndian.Uint16(in))
		match, rest, ok := length(int(token&15), in[2:])
		match += 4
		if !ok || back == 0 || back > len(out)-first {
			return nil, errLZ4
		}
		if len(out)+match > most {
			return nil, fmt.Errorf("lz4: more than %d bytes", most)
		}
		in = rest
		for match > 0 { // what is copied may overlap what is made
			n := min(match, back)
			out = append(out, out[len(out)-back:len(out)-back+n]...)
			match -= n
		}
	}
	return nil, errLZ4
}

// length reads a length that began with four bits.
func length(n int, in []byte) (int, []byte, bool) {
	if n < 15 {
		return n, in, true
	}
	for i, b := range in {
		if n += int(b); b != 255 {
			return n, in[i+1:], true
		}
	}
	return 0, nil, false
}
