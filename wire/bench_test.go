package wire

import (
	"fmt"
	"io"
	"testing"
)

func serveEcho(guest *Session) {
	for {
		stream, err := guest.Accept()
		if err != nil {
			return
		}
		go func() {
			defer stream.Close()
			for {
				kind, payload, err := stream.Recv(1 << 24)
				if err != nil || stream.Send(kind, payload) != nil {
					return
				}
			}
		}()
	}
}

// BenchmarkCall is one message there and back on a stream that is open.
func BenchmarkCall(b *testing.B) {
	for _, size := range []int{100, 1 << 10, 64 << 10} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			host, guest := sessions(b)
			go serveEcho(guest)
			stream, err := host.Open(b.Context(), "call", nil)
			if err != nil {
				b.Fatal(err)
			}
			defer stream.Close()
			payload := make([]byte, size)
			b.ReportAllocs()
			for b.Loop() {
				if err := stream.Send(FrameJSON, payload); err != nil {
					b.Fatal(err)
				}
				if _, _, err := stream.Recv(1 << 24); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkOpenCall opens a stream for each call, as the node does.
func BenchmarkOpenCall(b *testing.B) {
	for _, clients := range []int{1, 16} {
		b.Run(fmt.Sprint(clients), func(b *testing.B) {
			host, guest := sessions(b)
			go serveEcho(guest)
			payload := make([]byte, 1<<10)
			b.SetParallelism(max(1, clients/2)) // times GOMAXPROCS
			b.ReportAllocs()
			b.RunParallel(func(p *testing.PB) {
				for p.Next() {
					stream, err := host.Open(b.Context(), "call", map[string]string{"op": "read_files"})
					if err != nil {
						b.Error(err)
						return
					}
					stream.Send(FrameJSON, payload)
					if _, _, err := stream.Recv(1 << 24); err != nil {
						b.Error(err)
					}
					stream.Close()
				}
			})
		})
	}
}

// BenchmarkThroughput sends raw bytes one way.
func BenchmarkThroughput(b *testing.B) {
	host, guest := sessions(b)
	x, y := streams(b, host, guest)
	go io.Copy(io.Discard, y)
	piece := make([]byte, 64<<10)
	b.SetBytes(int64(len(piece)))
	for b.Loop() {
		if _, err := x.Write(piece); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkSocketPair is the floor of the former.
func BenchmarkSocketPair(b *testing.B) {
	x, y := socketPair(b)
	go io.Copy(io.Discard, y)
	piece := make([]byte, 64<<10)
	b.SetBytes(int64(len(piece)))
	for b.Loop() {
		if _, err := x.Write(piece); err != nil {
			b.Fatal(err)
		}
	}
}
