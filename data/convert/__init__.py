"""From published annotation files to a manifest, one module per family of formats.

    temporal_r1     the paper's own: `problem`, `solution` as shares of the video's length
    video_r1        Video-R1: multiple choice, numbers, OCR, free text, regression
    charades_sta    Charades-STA's text lines
    activitynet     ActivityNet Captions
    next_gqa        NExT-GQA: a csv of questions and a JSON file of spans
    benchmarks      MVBench, Video-MME, TempCompass

Each has a function from paths to a `conversion.Conversion`: the records, and by name whatever was
rejected, changed or left out, so that rows read = rows written + rejected + left out. `reading`
opens files, `fields` and `choices` read what most formats have in common. Files are read whole: the
largest published one is a few hundred megabytes.
"""
