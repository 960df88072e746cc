"""Genes of the human Y chromosome that say whether a cell has one, and the ones that cannot say it.

Y_GENES are single-copy or few-copy genes of the male-specific region (MSY) that are expressed outside the testis:
the X-degenerate class of Skaletsky et al. (2003, Nature 423:825, table 2) with the non-coding genes that single-cell
studies of LOY add (Thompson et al. 2019, Nature 575:652; Mattisson et al. 2021, Cell Mol Life Sci 78:4019; Vermeulen
et al. 2022, Genome Res 32:1795; Wilson et al. 2024, Genome Biol 25:36). Which of them a tissue expresses differs: the
caller keeps those that are detected in the XY cells at hand.

Left out, on purpose:

- pseudoautosomal genes (PAR1, PAR2): the X carries them too, so that a cell without Y still expresses them;
- genes of the X-transposed region (PCDH11Y, TGIF2LY), and TBL1Y and AMELY: 97 to 99% equal to their X copies, or
  silent outside few tissues, so that reads are mis-assigned in either direction;
- ampliconic genes (DAZ, RBMY, TSPY, HSFY, CDY, BPY2, VCY, XKRY, PRY): many copies, testis only.
"""

Y_GENES = (
    "RPS4Y1",
    "ZFY",
    "USP9Y",
    "DDX3Y",
    "UTY",
    "TMSB4Y",
    "NLGN4Y",
    "KDM5D",
    "EIF1AY",
    "TXLNGY",
    "PRKY",
    "TTTY14",
    "TTTY15",
    "TTTY10",
    "LINC00278",
    "RPS4Y2",
)
PAR_GENES = (
    # PAR1, in the order of the chromosome
    *("PLCXD1", "GTPBP6", "LINC00685", "PPP2R3B", "SHOX", "CRLF2", "CSF2RA", "IL3RA", "SLC25A6", "LINC00106"),
    *("ASMTL", "ASMTL-AS1", "P2RY8", "AKAP17A", "ASMT", "DHRSX", "ZBED1", "CD99P1", "CD99", "XG"),
    # PAR2
    *("SPRY3", "VAMP7", "IL9R", "WASH6P", "WASIR1"),
)
AMBIGUOUS_GENES = ("PCDH11Y", "TGIF2LY", "TBL1Y", "AMELY")
XIST = "XIST"  # expressed from the inactive X: cells of female donors
